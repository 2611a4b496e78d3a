"""Arguments and options that several commands share."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

Command = TypeVar("Command", bound=Callable[..., Any])


class OutputFile(click.Path):
    """A file to write, in a folder that exists: checked before the work, not after it.

    ``suffixes`` are those that its name may have; none stands for any.
    """

    def __init__(self, *suffixes: str) -> None:
        super().__init__(path_type=Path, dir_okay=False)
        self._suffixes = suffixes

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        """Return the path, if its folder exists and its suffix is allowed."""
        path = Path(os.fsdecode(super().convert(value, param, ctx)))
        if not path.parent.is_dir():
            self.fail(f"there is no folder `{path.parent}`. Create it, or correct the path.")
        if self._suffixes and path.suffix not in self._suffixes:
            self.fail(f"`{path}` has no known suffix; expected {', '.join(self._suffixes)}.")
        return path


run_argument = click.argument("run", type=click.Path(path_type=Path), metavar="RUN")
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON, for programs.")
rows_option = click.option(
    "-k",
    "--show",
    "show_",
    default=10,
    show_default=True,
    type=click.IntRange(min=1),
    help="Training samples to print; JSON holds all.",
)
scores_option = click.option(
    "--out",
    type=OutputFile(".npz"),
    help="Also save all scores to this `.npz` file; see the command `export`.",
)


def count_option(default: int) -> Callable[[Command], Command]:
    """Return the option for the number of proponents, and of opponents, of each query."""
    return click.option(
        "-k",
        default=default,
        show_default=True,
        type=click.IntRange(min=1),
        help="Proponents, and opponents, of each query.",
    )


def _together(*options: Callable[[Any], Any]) -> Callable[[Command], Command]:
    def decorate(command: Command) -> Command:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


model_options = _together(
    click.option(
        "--model",
        metavar="MODULE:NAME",
        help="The LightningModule: a class, an object, or a function that returns one.",
    ),
    click.option(
        "--config",
        type=click.Path(exists=True, dir_okay=False, path_type=Path),
        help="A LightningCLI configuration with `model` and `data`.",
    ),
    click.option(
        "--checkpoint",
        type=click.Path(exists=True, dir_okay=False, path_type=Path),
        help="A checkpoint with the trained weights.",
    ),
    click.option(
        "--trust-checkpoint",
        is_flag=True,
        help="Load objects of any class from the checkpoint; this can run code.",
    ),
)
query_options = _together(
    click.option(
        "--queries",
        metavar="MODULE:NAME",
        help="A batch, a DataLoader, a LightningDataModule, or a function that returns "
        "one of these. By default, the data of the configuration.",
    ),
    click.option(
        "--split",
        type=click.Choice(["test", "val", "train", "predict"]),
        default="test",
        show_default=True,
        help="Which data of a LightningDataModule.",
    ),
)
