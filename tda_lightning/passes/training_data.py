"""Anew: passes over data without training, at the weights that a model has.

They go through the user's own ``training_step`` under a recipe, as queries do.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.data import DataLoader

from tda_lightning.arguments import require_choice, require_kind
from tda_lightning.gradients.row_recorder import BatchRows
from tda_lightning.passes.batch_rows import own_gradients, record_batch, recording
from tda_lightning.passes.batches import require_loader, with_progress
from tda_lightning.passes.model_state import Mode
from tda_lightning.recording.sample_ids import IdSource, SampleLedger
from tda_lightning.stores import MemoryStore, Store, WritableStore, open_store_at
from tda_lightning.stores.recipe import Recipe, ranges_of
from tda_lightning.stores.step import Preconditioner, Step, StepFacts

Labels = Literal["given", "sampled"]


def record(
    model: nn.Module,
    loader: DataLoader[Any],
    *,
    like: str | Path | Store,
    labels: Labels = "given",
    at: int = -1,
    mode: Mode = "eval",
    sample_ids: IdSource | None = None,
    store: WritableStore | None = None,
    progress: bool = True,
) -> Store:
    """Record a pass over data at the weights that ``model`` has, without training.

    The result is a run of its own, one step per batch: training rows anew at the final weights, or
    their curvature, for methods that take them from elsewhere.

    Args:
        model: The LightningModule that was trained. It is left as it was.
        loader: The training data, say, in any order.
        like: The run whose recipe to record by: its folder or a store.
        labels: ``"sampled"`` adds rows from labels drawn from the model's own predictions.
        at: In the coordinates of which step of that run: its place, -1 for the last.
        mode: Whether the model acts as in evaluation or as in training.
        sample_ids: Where a batch has its samples' ids; by default learnt from the sampler.
        store: Where to record to; into memory by default.
        progress: Show a progress bar.

    Raises:
        FileNotFoundError: If there is no run at the path of ``like``.
        ValueError: If the model's layers are not the recorded ones, if ``training_step`` cannot
            take the batches or returns no loss, or if there are no batches.
    """
    require_loader(loader, "loader")
    require_choice("labels", labels, Labels)
    require_choice("mode", mode, Mode)
    run = open_store_at(like, "like", at)
    result = MemoryStore() if store is None else store
    require_kind("store", result, WritableStore, '`HDF5Store("anew.tda")`')
    ledger = SampleLedger(sample_ids)
    ledger.watch(loader, lambda: True)
    facts, preconditioner = run.facts[at], run.preconditioner(at)
    sampled = float(labels == "sampled")
    started = False
    try:
        with recording(model, run.recipe, preconditioner, mode, sampled) as rows:
            for number, batch in enumerate(with_progress(loader, "recording", progress)):
                named = ledger.name(batch, number)
                rows.seed(number)
                _, found = record_batch(model, rows, batch, "loader")
                if not started:
                    result.begin(_recipe(run, ledger, labels))
                    started = True
                result.append(_step(number, facts, named, found, run, preconditioner))
    finally:
        ledger.release()
        if started:
            result.seal()
    if not started:
        raise ValueError("`loader` is an empty loader; expected at least one batch.")
    return result


def _recipe(run: Store, ledger: SampleLedger, labels: Labels) -> Recipe:
    ids = ledger.train_ids
    return replace(
        run.recipe,
        train_ids=None if ids is None else ranges_of(ids),
        curvature="fisher" if labels == "sampled" else "none",
        every_n_steps=1,
        is_training=False,
    )


def _step(
    number: int,
    facts: StepFacts,
    sample_ids: Int[Tensor, " n"],
    found: BatchRows,
    run: Store,
    preconditioner: Preconditioner | None,
) -> Step:
    n = len(sample_ids)
    weight = 1 / n if run.recipe.reduction == "mean" else 1.0
    return Step(
        index=number,
        epoch=0,
        optimizer=facts.optimizer,
        groups=facts.groups,
        sample_ids=sample_ids,
        weights=torch.full((n,), weight),
        sketch=found.rows.cpu(),
        terms=_on_cpu(found.terms),
        curvature=_on_cpu(found.curvature(weight)),
        curvature_rows=_on_cpu(found.curvature_rows),
        preconditioner=preconditioner if number == 0 else None,
        loss=found.loss,
    )


def _on_cpu(found: Tensor | None) -> Tensor | None:
    return None if found is None else found.cpu()


def train_rows(
    model: nn.Module,
    loader: DataLoader[Any],
    recipe: Recipe,
    *,
    sample_ids: IdSource | None = None,
) -> Generator[tuple[Int[Tensor, " n"], Float[Tensor, "n k"]], None, None]:
    """Sketch, batch by batch, the gradient of each training sample's own loss.

    Nothing is kept. The model is in evaluation mode, and is left as it was at the end: close it
    where you may stop before, with ``contextlib.closing``.

    Args:
        model: The LightningModule, with the weights to ask about.
        loader: The training data, in any order.
        recipe: How to record.
        sample_ids: Where a batch has its samples' ids; by default learnt from the sampler.

    Yields:
        The ids of a batch's samples and their rows, where the model is, shape ``(n, k)``.

    Raises:
        ValueError: If the ids cannot be known, or ``training_step`` cannot take a batch.
    """
    ledger = SampleLedger(sample_ids)
    ledger.watch(loader, lambda: True)
    try:
        with recording(model, recipe, None, "eval", sampled=0.0) as rows:
            for number, batch in enumerate(loader):
                named = ledger.name(batch, number)
                _, found = record_batch(model, rows, batch, "train_loader")
                yield named, own_gradients(found, recipe)
    finally:
        ledger.release()


def sampled_rows(
    model: nn.Module,
    batches: Iterable[Any],
    recipe: Recipe,
    *,
    seed: int = 0,
    argument: str = "train_loader",
) -> Generator[Float[Tensor, "n k"], None, None]:
    """Sketch, batch by batch, gradients for labels drawn from the model's own predictions.

    The model is in evaluation mode, and is left as it was at the end: close it where you may stop
    before, with ``contextlib.closing``.

    Args:
        model: The LightningModule, with the weights to ask about.
        batches: Training data.
        recipe: How to record.
        seed: Which labels are drawn.
        argument: What the data are called where the user has passed them.

    Yields:
        Rows, where the model is; on average their outer products sum to the Gauss-Newton matrix of
        the batch's loss.

    Raises:
        ValueError: If ``training_step`` cannot take a batch, or its loss has no labels to draw.
    """
    with recording(model, recipe, None, "eval", sampled=1.0) as rows:
        for number, batch in enumerate(batches):
            rows.seed(seed + number)
            _, found = record_batch(model, rows, batch, argument)
            assert found.curvature_rows is not None
            yield found.curvature_rows
