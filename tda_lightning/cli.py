"""The command line: ``tda-lightning info RUN``, ``audit``, ``data`` and ``verify RUN``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from tda_lightning.stores import HDF5Store
from tda_lightning.stores.damage import printable
from tda_lightning.stores.data_order import data_order
from tda_lightning.stores.durable import absolute_path
from tda_lightning.stores.hdf5.verification import verify_files
from tda_lightning.stores.recipe import Recipe


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; return 0, or print one line to standard error and return 1."""
    options = _parser().parse_args(arguments)
    try:
        print(options.describe(options.run))
    except BadRunError as error:
        print(error)
        return 1
    except Exception as error:  # Whatever is wrong with a run, its user gets one line.
        is_expected = isinstance(error, OSError | ValueError)
        name = "" if is_expected else f"{type(error).__name__}: "
        message = printable(" ".join(str(error).split()))
        print(f"tda-lightning: {name}{message}", file=sys.stderr)
        return 1
    return 0


def info(run: Path) -> str:
    """Describe a run: its steps, samples and size, and which layers it records or leaves out.

    Args:
        run: The folder of the run; the recording may still be in progress.
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


def audit(run: Path) -> str:
    """Show how much of the gradient, and of the parameter update, the recorded rows explain.

    Args:
        run: The folder of the run.

    Raises:
        ValueError: If no step of the run was audited.
    """
    store = HDF5Store.open(run)
    audits = store.audits()
    if not audits:
        raise ValueError(f"`{run}` has no audited step yet; expected at least the first one.")
    explained = torch.stack([entry.explained() for entry in audits])
    rows = [
        (block.name, block.layer, f"{mean:.2%}", f"{minimum:.2%}")
        for block, mean, minimum in zip(
            store.recipe.blocks, explained.mean(dim=0), explained.amin(dim=0), strict=True
        )
    ]
    overall = [entry.explained_in_all() for entry in audits]
    update = [entry.update for entry in audits]
    left_out = len(store.recipe.left_out)
    rows += [
        (f"all, including {left_out} left out", "", f"{_mean(overall):.2%}", f"{min(overall):.2%}"),
        ("parameter update", "", f"{_mean(update):.2%}", f"{min(update):.2%}"),
    ]
    head = f"{run}: {len(audits)} of {len(store):,} steps audited; share that the rows explain"
    return "\n".join([head, *_aligned([("layer", "type", "mean", "minimum"), *rows])])


def data(run: Path) -> str:
    """Show the order of the data: samples that are missing or repeated, and replayed steps.

    Args:
        run: The folder of the run.
    """
    store = HDF5Store.open(run)
    order = data_order(store)
    repeated = [f"{len(ids):,} in epoch {epoch}" for epoch, ids in order.repeated.items()]
    same = [f"{epoch} as {earlier}" for epoch, earlier in order.same_order.items()]
    rows = [
        ("steps", _steps(store)),
        ("samples", _samples(store)),
        ("never seen", _count_and_list([str(sample) for sample in order.never.tolist()])),
        ("seen again in one epoch", _count_and_list(repeated)),
        ("steps replayed", _count_and_list([f"{index:,}" for index in order.replayed])),
        ("epochs in the same order", _count_and_list(same)),
    ]
    return "\n".join([f"{run}: the order of the data", *_aligned(rows)])


def verify(run: Path) -> str:
    """Check every file of a run against its checksum.

    Args:
        run: The folder of the run.

    Raises:
        ValueError: If a file is damaged or missing; the message lists all files.
    """
    reports = list(verify_files(absolute_path(run)))
    bad = [report for report in reports if report.state in ("damaged", "missing")]
    unverified = sum(report.state == "unverified" for report in reports)
    rows = _aligned([(report.name, report.state, report.content) for report in reports])
    old = f", {unverified:,} without a checksum, of an older version" if unverified else ""
    head = f"{run}: {len(reports):,} files, {len(bad):,} damaged or missing{old}"
    text = "\n".join([head, *rows])
    if bad:
        raise BadRunError(text)
    return text


class BadRunError(ValueError):
    """A run has damaged or missing files; the message is a table of all files."""


def _count_and_list(items: Sequence[str]) -> str:
    shown = ", ".join(items[:8]) + (", ..." if len(items) > 8 else "")
    return f"{len(items):,}: {shown}" if items else "none"


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tda-lightning", description="Training data attribution for PyTorch Lightning."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, describe, purpose in (
        ("info", info, "show what a run recorded"),
        ("data", data, "show missing and repeated samples, and replayed steps"),
        ("verify", verify, "check every file against its checksum"),
        ("audit", audit, "show how much of the training the recorded rows explain"),
    ):
        command = commands.add_parser(name, help=purpose, description=purpose)
        command.add_argument("run", type=Path, metavar="RUN", help="folder of the run")
        command.set_defaults(describe=describe)
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
    first, last = store.facts[0], store.facts[-1]
    stride = store.recipe.every_n_steps
    every = "" if stride == 1 else f", one in {stride}"
    indices = f"index {first.index:,} to {last.index:,}{every}"
    return f"{len(store):,} ({indices}), epochs {first.epoch} to {last.epoch}"


def _samples(store: HDF5Store) -> str:
    n_visited, n_train = len(store.visited_ids()), len(store.train_ids())
    return f"{n_visited:,} drawn of {n_train:,} in the training set"


def _optimizer(store: HDF5Store) -> str:
    if len(store) == 0:
        return "unknown"
    first, last = store.facts[0], store.facts[-1]
    return (
        f"{first.optimizer}, learning rate {first.lr:g} in the first step, {last.lr:g} in the last"
    )


def _layer_table(recipe: Recipe) -> list[str]:
    left_out = recipe.left_out
    recorded = recipe.recorded_blocks
    total = sum(block.size for block in recorded) + sum(entry.size for entry in left_out)
    rows = [
        (block.name, block.layer, f"{block.size:,}", f"{block.size / total:.1%}", "recorded")
        for block in recorded
    ]
    rows += [
        (
            entry.name,
            entry.layer,
            f"{entry.size:,}",
            f"{entry.size / total:.1%}",
            f"LEFT OUT: {entry.reason}",
        )
        for entry in left_out
    ]
    return _aligned([("layer", "type", "parameters", "share", ""), *rows])


def _aligned(rows: Sequence[tuple[str, ...]]) -> list[str]:
    rows = [tuple(map(printable, row)) for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  "
        + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]


if __name__ == "__main__":
    sys.exit(main())
