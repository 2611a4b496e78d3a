"""The commands that inspect a run: ``info``, ``audit``, ``data`` and ``verify``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click
import torch

from tda_lightning.cli.options import json_option, run_argument
from tda_lightning.cli.output import Answer, FailedCheck, aligned, show
from tda_lightning.stores import HDF5Store
from tda_lightning.stores.arguments import absolute_path
from tda_lightning.stores.data_order import data_order
from tda_lightning.stores.hdf5.verification import FileReport, verify_files
from tda_lightning.stores.recipe import Block, LeftOut, Recipe


@click.command()
@run_argument
@json_option
def info(run: Path, as_json: bool) -> None:
    """Show the steps, samples, size and layers of a run."""
    store = HDF5Store.open(run)
    facts, layers = _facts(store), _layers(store.recipe)
    title = f"{run}: a recording of `{store.recipe.model}`"
    lines = [title, *aligned(_fact_rows(facts)), "", *aligned(_layer_rows(layers))]
    show(Answer(lines, {"run": str(run), **facts, "layers": layers}), as_json)


@click.command()
@run_argument
@click.option(
    "--least",
    type=click.FloatRange(0, 1),
    help="Exit with 1 if a smaller mean share of the gradient is explained.",
)
@json_option
def audit(run: Path, least: float | None, as_json: bool) -> None:
    """Show how much of the training the recorded rows explain."""
    store = HDF5Store.open(run)
    answer = _audit(run, store)
    show(answer, as_json)
    if least is not None and answer.data["gradient"]["mean"] < least:
        raise FailedCheck


@click.command()
@run_argument
@click.option("--check", is_flag=True, help="Exit with 1 if samples are missing or repeated.")
@json_option
def data(run: Path, check: bool, as_json: bool) -> None:
    """Show missing and repeated samples, and replayed steps."""
    store = HDF5Store.open(run)
    order = data_order(store)
    never, facts = order.never.tolist(), _facts(store)
    rows = [("steps", _steps(facts)), ("samples", _samples(facts)), *order.summary().items()]
    answer = Answer(
        [f"{run}: the order of the data", *aligned(rows)],
        {
            "run": str(run),
            "never": never,
            "repeated": {epoch: ids.tolist() for epoch, ids in order.repeated.items()},
            "replayed": list(order.replayed),
            "same_order": order.same_order,
        },
    )
    show(answer, as_json)
    if check and (never or order.repeated or order.replayed or order.same_order):
        raise FailedCheck


@click.command(short_help="Check every file of a run.")
@run_argument
@json_option
def verify(run: Path, as_json: bool) -> None:
    """Check every file of a run; exit with 1 if one is damaged or missing."""
    reports = list(verify_files(absolute_path(run)))
    bad = [report for report in reports if report.state in ("damaged", "missing")]
    show(_verification(run, reports, len(bad)), as_json)
    if bad:
        raise FailedCheck


def _verification(run: Path, reports: Sequence[FileReport], n_bad: int) -> Answer:
    unverified = sum(report.state == "unverified" for report in reports)
    old = f", {unverified:,} without a checksum, of an older version" if unverified else ""
    head = f"{run}: {len(reports):,} files, {n_bad:,} damaged or missing{old}"
    rows = aligned([(report.name, report.state, report.content) for report in reports])
    files = [vars(report) for report in reports]
    return Answer([head, *rows], {"run": str(run), "bad": n_bad, "files": files})


def _audit(run: Path, store: HDF5Store) -> Answer:
    audits = store.audits()
    if not audits:
        raise ValueError(f"`{run}` has no audited step yet; expected at least the first one.")
    explained = torch.stack([entry.explained() for entry in audits])
    layers = [
        {"name": block.name, "type": block.layer, **_statistics(shares.tolist())}
        for block, shares in zip(store.recipe.blocks, explained.mT, strict=True)
    ]
    gradient = _statistics([entry.explained_in_all() for entry in audits])
    update = _statistics([entry.update for entry in audits])
    n_left_out = len(store.recipe.left_out)
    rows = [
        ("layer", "type", "mean", "minimum"),
        *((str(layer["name"]), str(layer["type"]), *_percentages(layer)) for layer in layers),
        (f"all, including {n_left_out} left out", "", *_percentages(gradient)),
        ("parameter update", "", *_percentages(update)),
    ]
    head = f"{run}: {len(audits)} of {len(store):,} steps audited; share that the rows explain"
    facts = {"run": str(run), "audited_steps": len(audits), "steps": len(store)}
    content = {**facts, "layers": layers, "gradient": gradient, "update": update}
    return Answer([head, *aligned(rows)], content)


def _statistics(shares: Sequence[float]) -> dict[str, float]:
    return {"mean": sum(shares) / len(shares), "minimum": min(shares)}


def _percentages(statistics: Mapping[str, Any]) -> tuple[str, str]:
    return f"{statistics['mean']:.2%}", f"{statistics['minimum']:.2%}"


def _facts(store: HDF5Store) -> dict[str, Any]:
    recipe = store.recipe
    first, last = (store.facts[0], store.facts[-1]) if len(store) else (None, None)
    return {
        "model": recipe.model,
        "steps": len(store),
        "first_step": first and first.index,
        "last_step": last and last.index,
        "every_n_steps": recipe.every_n_steps,
        "epochs": first and last and [first.epoch, last.epoch],
        "samples_drawn": len(store.visited_ids()),
        "samples": store.n_train,
        "optimizer": first and first.optimizer,
        "learning_rates": first and last and [first.lr, last.lr],
        "dimension": recipe.dimension,
        "dtype": str(recipe.dtype),
        "projector": dict(recipe.projector),
        "bytes": store.size_on_disk,
        "versions": dict(recipe.versions),
    }


def _fact_rows(facts: Mapping[str, Any]) -> list[tuple[str, str]]:
    projector = facts["projector"]
    arguments = ", ".join(f"{k}={v}" for k, v in projector.items() if k != "name")
    versions = ", ".join(f"{name} {number}" for name, number in facts["versions"].items())
    return [
        ("steps", _steps(facts)),
        ("samples", _samples(facts)),
        ("rows", f"{facts['dimension']} x {facts['dtype']} by {projector['name']}({arguments})"),
        ("optimizer", _optimizer(facts)),
        ("size on disk", f"{facts['bytes'] / 2**20:,.1f} MiB"),
        ("recorded by", versions),
    ]


def _steps(facts: Mapping[str, Any]) -> str:
    if not facts["steps"]:
        return "none yet"
    stride = facts["every_n_steps"]
    every = "" if stride == 1 else f", one in {stride}"
    indices = f"index {facts['first_step']:,} to {facts['last_step']:,}{every}"
    first_epoch, last_epoch = facts["epochs"]
    return f"{facts['steps']:,} ({indices}), epochs {first_epoch} to {last_epoch}"


def _samples(facts: Mapping[str, Any]) -> str:
    return f"{facts['samples_drawn']:,} drawn of {facts['samples']:,} in the training set"


def _optimizer(facts: Mapping[str, Any]) -> str:
    if not facts["steps"]:
        return "unknown"
    first, last = facts["learning_rates"]
    return f"{facts['optimizer']}, learning rate {first:g} in the first step, {last:g} in the last"


def _layers(recipe: Recipe) -> list[dict[str, Any]]:
    entries: list[tuple[Block | LeftOut, str]] = [(block, "") for block in recipe.recorded_blocks]
    entries += [(entry, entry.reason) for entry in recipe.left_out]
    total = sum(entry.size for entry, _ in entries)
    return [
        {
            "name": entry.name,
            "type": entry.layer,
            "parameters": entry.size,
            "share": entry.size / total,
            "left_out": reason or None,
        }
        for entry, reason in entries
    ]


def _layer_rows(layers: Sequence[Mapping[str, Any]]) -> list[tuple[str, ...]]:
    rows = [
        (
            layer["name"],
            layer["type"],
            f"{layer['parameters']:,}",
            f"{layer['share']:.1%}",
            f"LEFT OUT: {layer['left_out']}" if layer["left_out"] else "recorded",
        )
        for layer in layers
    ]
    return [("layer", "type", "parameters", "share", ""), *rows]
