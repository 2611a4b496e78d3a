"""The command line: ``tda-lightning info RUN``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from tda_lightning.recipe import Recipe
from tda_lightning.stores import HDF5Store


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; return 0, or 1 after one clear line on the standard error."""
    options = _parser().parse_args(arguments)
    try:
        print(info(options.run))
    except (OSError, ValueError) as error:
        print(f"tda-lightning: {error}", file=sys.stderr)
        return 1
    return 0


def info(run: Path) -> str:
    """Describe a run: what was recorded, what was not and why, how long and how large it is.

    Args:
        run: The folder of the run; it may still be being recorded.
    """
    store = HDF5Store.open(run)
    recipe = store.recipe
    return "\n".join(
        [
            f"{run}: a recording of `{recipe.model}`",
            *_aligned(_facts(store)),
            "",
            *_layer_table(recipe),
        ]
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tda-lightning", description="Training data attribution for PyTorch Lightning."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    command = commands.add_parser("info", help="say what a run recorded", description=info.__doc__)
    command.add_argument("run", type=Path, metavar="RUN", help="folder of the run")
    return parser


def _facts(store: HDF5Store) -> list[tuple[str, str]]:
    recipe = store.recipe
    arguments = ", ".join(f"{k}={v}" for k, v in recipe.projector.items() if k != "name")
    return [
        ("steps", _steps(store)),
        ("samples", _samples(store)),
        ("rows", f"{recipe.dimension} x {recipe.dtype} by {recipe.projector['name']}({arguments})"),
        ("optimizer", _optimizer(store)),
        ("size on disk", f"{store.size_on_disk / 2**20:,.1f} MiB"),
        ("recorded by", ", ".join(f"{name} {number}" for name, number in recipe.versions.items())),
    ]


def _steps(store: HDF5Store) -> str:
    if len(store) == 0:
        return "none yet"
    first, last = store[0], store[-1]
    stride = store.recipe.every_n_steps
    every = "" if stride == 1 else f", one in {stride}"
    indices = f"index {first.index:,} to {last.index:,}{every}"
    return f"{len(store):,} ({indices}), epochs {first.epoch} to {last.epoch}"


def _samples(store: HDF5Store) -> str:
    drawn, known = len(store.visited_ids()), len(store.train_ids())
    return f"{drawn:,} drawn of {known:,} in the training set"


def _optimizer(store: HDF5Store) -> str:
    if len(store) == 0:
        return "unknown"
    first, last = store[0], store[-1]
    return f"{first.optimizer}, learning rate {first.lr:g} at first and {last.lr:g} at last"


def _layer_table(recipe: Recipe) -> list[str]:
    total = sum(block.size for block in recipe.blocks) + sum(one.size for one in recipe.left_out)
    rows = [
        (block.name, block.layer, f"{block.size:,}", f"{block.size / total:.1%}", "recorded")
        for block in recipe.blocks
    ]
    rows += [
        (one.name, one.layer, f"{one.size:,}", f"{one.size / total:.1%}", f"LEFT OUT: {one.reason}")
        for one in recipe.left_out
    ]
    return _aligned([("layer", "type", "parameters", "share", ""), *rows])


def _aligned(rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  "
        + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]


if __name__ == "__main__":
    sys.exit(main())
