"""Tables of scores: tidy columns, data frames and CSV files."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

from tda_lightning.results.optional import DataFrame, import_pandas
from tda_lightning.stores.arguments import absolute_path
from tda_lightning.stores.integrity.durable import atomic_write

Columns = Mapping[str, NDArray[Any]]


def ranked_columns(
    query_ids: Int[Tensor, " n_query"] | None,
    ids: Int[Tensor, "n_query k"],
    values: Float[Tensor, "n_query k"],
    tokens: Int[Tensor, " n_query"] | None = None,
) -> dict[str, NDArray[Any]]:
    """Return the columns ``query`` and ``token`` (if given), ``rank``, ``train_id``, ``score``."""
    n_query, k = ids.shape
    names = {"query": query_ids, "token": tokens}
    queries = {name: np.repeat(v.numpy(), k) for name, v in names.items() if v is not None}
    return {
        **queries,
        "rank": np.tile(np.arange(k), n_query),
        "train_id": ids.flatten().numpy(),
        "score": values.flatten().numpy(),
    }


def signed_columns(proponents: Columns, opponents: Columns) -> dict[str, NDArray[Any]]:
    """Join two tables of ranks: each query's proponents, with sign 1, then its opponents, -1."""
    count = len(proponents["rank"])
    signs = np.repeat([1, -1], count)
    joined = {name: np.concatenate([proponents[name], opponents[name]]) for name in proponents}
    k = int(joined["rank"].max()) + 1
    # Stable: within a query, proponents come first, in order of their ranks.
    order = np.argsort(np.tile(np.arange(count) // k, 2), kind="stable")
    return {name: column[order] for name, column in {**joined, "sign": signs}.items()}


def data_frame(columns: Columns) -> DataFrame:
    """Return a data frame of columns (needs ``pandas``)."""
    pd = import_pandas()
    return pd.DataFrame(dict(columns))


def frame_by_sample(ids: Int[Tensor, " n"], columns: Mapping[str, Tensor]) -> DataFrame:
    """Return a data frame with a row per training sample, indexed by its id."""
    pd = import_pandas()
    index = pd.Index(ids.numpy(), name="train")
    return pd.DataFrame({name: values.numpy() for name, values in columns.items()}, index=index)


def write_columns(path: str | Path, columns: Columns) -> None:
    """Write columns to a CSV file; an existing file is replaced."""
    write_csv(path, list(columns), zip(*(c.tolist() for c in columns.values()), strict=True))


def write_csv(path: str | Path, header: Sequence[object], rows: Iterable[Iterable[object]]) -> None:
    """Write rows to a CSV file, atomically; an existing file is replaced."""
    with (
        atomic_write(absolute_path(path)) as partial,
        partial.open("w", newline="", encoding="utf-8") as file,
    ):
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(rows)
