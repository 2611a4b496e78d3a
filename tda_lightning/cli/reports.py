"""The command ``report``: one page that shows which training samples made the model do that."""

from __future__ import annotations

from pathlib import Path

import click
from torch.utils.data import DataLoader

from tda_lightning.cli.answers import METHODS
from tda_lightning.cli.loading import as_loader, load_model, load_queries
from tda_lightning.cli.options import (
    OutputFile,
    count_option,
    json_option,
    model_options,
    query_options,
    run_argument,
)
from tda_lightning.cli.output import Answer, show


@click.command(short_help="Write one HTML page to look at and to send.")
@run_argument
@model_options
@query_options
@click.option(
    "--train",
    metavar="MODULE:NAME",
    help="The dataset of the training, its DataLoader, or a LightningDataModule. By default, the "
    "data of the configuration.",
)
@click.option("--method", type=click.Choice(list(METHODS)), default="averaged", show_default=True)
@count_option(8)
@click.option(
    "--out", default="report.html", show_default=True, type=OutputFile(), help="File to write."
)
@click.option("--class-names", default="", help="Names of the classes, separated by commas.")
@click.option("--column-names", default="", help="Names of the columns of table rows, likewise.")
@click.option("--title", default="", help="Title of the page.")
@json_option
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
    class_names: str,
    column_names: str,
    title: str,
    as_json: bool,
) -> None:
    """Write a page that shows which training samples made the model do that.

    The page is one file, which needs no server and loads nothing.
    """
    from tda_lightning.report import report as write_report

    if train is None and config is None:
        raise click.UsageError(
            "Name the dataset of the training: `--train module:name`, or `--config config.yaml`."
        )
    loaded = load_model(model, config, checkpoint, trust_checkpoint)
    batch = as_loader(load_queries(queries, config, split))
    training = load_queries(train, config, "train", "--train")
    path = write_report(
        run,
        loaded,
        batch,
        train=training.dataset if isinstance(training, DataLoader) else training,
        out=out,
        method=METHODS[method],
        k=k,
        class_names=_names(class_names),
        column_names=_names(column_names),
        title=title,
    )
    size = path.stat().st_size
    line = f"{path}: {size / 2**20:.1f} MiB; open it in a browser"
    show(Answer([line], {"run": str(run), "out": str(path), "bytes": size}), as_json)


def _names(listed: str) -> list[str]:
    return [name.strip() for name in listed.split(",")] if listed else []
