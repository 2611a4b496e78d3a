"""The command ``report``: one page that shows which training samples made the model do that."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
from torch.utils.data import DataLoader

from tda_lightning.cli.answers import METHODS
from tda_lightning.cli.loading import load_model, load_queries
from tda_lightning.cli.options import model_options, query_options, run_argument
from tda_lightning.cli.output import Answer, show, show_progress


@click.command()
@run_argument
@model_options
@query_options
@click.option(
    "--train",
    metavar="MODULE:NAME",
    help="The dataset of the training, its DataLoader, or a LightningDataModule. By default, the "
    "data of the configuration.",
)
@click.option("--method", type=click.Choice(list(METHODS)), default="unrolled", show_default=True)
@click.option("-k", default=8, show_default=True, type=click.IntRange(min=1), help="Per query.")
@click.option(
    "--out",
    default="report.html",
    show_default=True,
    type=click.Path(path_type=Path, dir_okay=False),
    help="File to write.",
)
@click.option("--title", default="", help="Title of the page.")
def report(
    run: Path,
    model: str | None,
    config: Path | None,
    checkpoint: Path | None,
    trust_checkpoint: bool,
    queries: str | None,
    split: str,
    train: str | None,
    method: str,
    k: int,
    out: Path,
    title: str,
) -> None:
    """Write a page that shows which training samples made the model do that.

    The page is one file, which needs no server and loads nothing.
    """
    from tda_lightning.report import report as write_report

    loaded = load_model(model, config, checkpoint, trust_checkpoint)
    batch = load_queries(queries, config, split)
    dataset = _dataset_of(load_queries(train, config, "train"))
    path = write_report(
        run,
        loaded,
        batch,
        train=dataset,
        out=out,
        method=METHODS[method],
        k=k,
        title=title,
        progress=show_progress(),
    )
    show(Answer([f"{path}: {path.stat().st_size / 2**20:.1f} MiB"], {}), as_json=False)


def _dataset_of(train: Any) -> Any:
    return train.dataset if isinstance(train, DataLoader) else train
