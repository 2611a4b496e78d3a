"""The command ``export``: a run's visits or a saved result as a table for other tools."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from numpy.typing import NDArray

from tda_lightning.cli.options import OutputFile, json_option
from tda_lightning.cli.output import Answer, show
from tda_lightning.results import SampleScores, Scores
from tda_lightning.results.optional import needs
from tda_lightning.results.tables import ranked_columns, signed_columns
from tda_lightning.stores import HDF5Store
from tda_lightning.stores.arguments import absolute_path
from tda_lightning.stores.integrity.durable import atomic_write

# Named columns of equal length.
Table = dict[str, NDArray[Any]]


def _write_csv(path: Path, table: Table) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(table)
        writer.writerows(zip(*(column.tolist() for column in table.values()), strict=True))


def _write_parquet(path: Path, table: Table) -> None:
    with needs("parquet"):
        import pyarrow
        from pyarrow import parquet
    parquet.write_table(pyarrow.table(table), path)


def _write_numpy(path: Path, table: Table) -> None:
    """Write a structured array, with one field per column."""
    fields = [(name, column.dtype) for name, column in table.items()]
    array = np.empty(len(next(iter(table.values()))), dtype=fields)
    for name, column in table.items():
        array[name] = column
    with path.open("wb") as file:  # Given a path, NumPy would append a suffix.
        np.save(file, array, allow_pickle=False)


WRITERS: dict[str, Callable[[Path, Table], None]] = {
    ".csv": _write_csv,
    ".parquet": _write_parquet,
    ".npy": _write_numpy,
}


@click.command(short_help="Write a run or scores as CSV, Parquet or NumPy.")
@click.argument("source", type=click.Path(path_type=Path), metavar="SOURCE")
@click.option(
    "--out",
    required=True,
    type=OutputFile(*WRITERS),
    help="File to write; its suffix chooses the format: `.csv`, `.parquet` or `.npy`.",
)
@click.option(
    "--top",
    type=click.IntRange(min=1),
    help="Of scores, only this many proponents and opponents per query.",
)
@json_option
def export(source: Path, out: Path, top: int | None, as_json: bool) -> None:
    """Write a table for other tools.

    SOURCE is the folder of a run, or a `.npz` file that `save` or `--out` wrote. A run gives one
    row per visit of a training sample, without the sketch. Scores give one row per query and
    training sample.
    """
    table = _table_of(source, top)
    with atomic_write(absolute_path(out)) as partial:
        WRITERS[out.suffix](partial, table)
    n_rows = len(next(iter(table.values())))
    line = f"{out}: {n_rows:,} rows of {', '.join(table)}"
    content = {"source": str(source), "out": str(out), "rows": n_rows, "columns": list(table)}
    show(Answer([line], content), as_json)


def _table_of(source: Path, top: int | None) -> Table:
    if source.suffix != ".npz":
        _require_no_top(top, "a run has none")
        return _visits(source)
    try:
        scores = Scores.load(source)
    except ValueError:
        of_samples = SampleScores.load(source)
        _require_no_top(top, f"`{source}` has one score per training sample")
        return _sample_table(of_samples)
    return _score_table(scores) if top is None else _top_table(scores, top)


def _require_no_top(top: int | None, reason: str) -> None:
    if top is not None:
        raise click.UsageError(f"`--top` is for scores of queries; {reason}.")


def _visits(run: Path) -> Table:
    """Return the visits of a run: which sample, in which step, with which weight."""
    steps = list(HDF5Store.open(run).facts)
    lengths = torch.tensor([len(step.sample_ids) for step in steps], dtype=torch.int64)

    def per_step(values: list[Any], dtype: torch.dtype) -> NDArray[Any]:
        return torch.tensor(values, dtype=dtype).repeat_interleave(lengths).numpy()

    return {
        "step": per_step([step.index for step in steps], torch.int64),
        "epoch": per_step([step.epoch for step in steps], torch.int64),
        "learning_rate": per_step([step.lr for step in steps], torch.float64),
        "sample_id": _joined([step.sample_ids for step in steps], torch.int64),
        "weight": _joined([step.weights for step in steps], torch.float32),
    }


def _joined(parts: list[torch.Tensor], dtype: torch.dtype) -> NDArray[Any]:
    joined: NDArray[Any] = torch.cat([torch.empty(0, dtype=dtype), *parts]).numpy()
    return joined


def _score_table(scores: Scores) -> Table:
    n_query, n_train = scores.values.shape
    return {
        "query": scores.query_ids.repeat_interleave(n_train).numpy(),
        "train_id": scores.train_ids.repeat(n_query).numpy(),
        "score": scores.values.flatten().numpy(),
    }


def _top_table(scores: Scores, k: int) -> Table:
    sides = (scores.proponents(k), scores.opponents(k))
    tables = (ranked_columns(scores.query_ids, s.ids, s.values, scores.tokens) for s in sides)
    return signed_columns(*tables)


def _sample_table(scores: SampleScores) -> Table:
    return {"train_id": scores.train_ids.numpy(), "score": scores.values.numpy()}
