"""Record passes over training data at fixed weights, without training.

Batches go through the user's own ``training_step`` under a recipe, like queries.
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

from tda_lightning.gradients.row_pass import BatchRows
from tda_lightning.passes.batch_contents import require_batches
from tda_lightning.passes.batches import (
    named_batches,
    record_batch,
    recording,
    require_loader,
    sample_gradients,
)
from tda_lightning.passes.model_state import Mode
from tda_lightning.recording.sample_ids import IdSource, SampleLedger
from tda_lightning.stores import MemoryStore, Store, WritableStore, open_store_at
from tda_lightning.stores.arguments import require_choice, require_kind
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
    """Record a pass over data at the current weights of ``model``, without training.

    The result is a separate run with one step per batch. Some methods can take the rows or the
    curvature of training samples at the final weights from it.

    Args:
        model: The trained LightningModule. Its state is restored afterwards.
        loader: The data, usually the training data, in any order.
        like: The run whose recipe to record by: its folder or a store.
        labels: ``"sampled"`` adds rows for labels sampled from the model's predictions.
        at: Position of the step of that run whose coordinates are used; -1 for the last.
        mode: Whether the model is in evaluation or training mode.
        sample_ids: Key of the ids in a batch, or a function from a batch to its ids. By default,
            ids are inferred from the sampler.
        store: The store to record to; by default in memory.
        progress: Show a progress bar.

    Raises:
        FileNotFoundError: If there is no run at the path of ``like``.
        ValueError: If the model's layers are not the recorded ones, if ``training_step`` fails on
            a batch or returns no loss, or if there are no batches.
    """
    require_loader(loader, "loader")
    require_choice("labels", labels, Labels)
    require_choice("mode", mode, Mode)
    run = open_store_at(like, "like", at)
    result = MemoryStore() if store is None else store
    require_kind("store", result, WritableStore, '`HDF5Store("pass.tda")`')
    ledger = SampleLedger(sample_ids)
    named = named_batches(ledger, loader, "recording", progress)
    facts, preconditioner = run.facts[at], run.preconditioner(at)
    recorder = recording(model, run.recipe, preconditioner, mode, labels)
    started = False
    try:
        with named as batches, recorder as rows:
            for number, (ids, batch) in enumerate(batches):
                rows.seed(number)
                _, batch_rows = record_batch(model, rows, batch, "loader", ids)
                if not started:
                    result.begin(_recipe(run, ledger, labels))
                    started = True
                result.append(_step(number, facts, ids, batch_rows, run, preconditioner))
    finally:
        if started:
            result.seal()
    require_batches(started, "loader")
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
    batch_rows: BatchRows,
    run: Store,
    preconditioner: Preconditioner | None,
) -> Step:
    n = len(sample_ids)
    weight = 1 / n if run.recipe.reduction == "mean" else 1.0
    known = batch_rows.loss.facts().of_visits(weight)
    loss_facts: dict[str, Any] = {name: _on_cpu(fact) for name, fact in known.items()}
    return Step(
        index=number,
        epoch=0,
        optimizer=facts.optimizer,
        groups=facts.groups,
        sample_ids=sample_ids,
        weights=torch.full((n,), weight),
        sketch=batch_rows.rows.cpu(),
        **loss_facts,
        curvature_rows=_on_cpu(batch_rows.curvature_rows),
        preconditioner=preconditioner if number == 0 else None,
        loss=batch_rows.loss.name,
    )


def _on_cpu(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.cpu()


def train_rows(
    model: nn.Module,
    loader: DataLoader[Any],
    recipe: Recipe,
    *,
    sample_ids: IdSource | None = None,
) -> Generator[tuple[Int[Tensor, " n"], Float[Tensor, "n k"]], None, None]:
    """Yield the ids of a batch's samples, and a sketch of the gradient of each one's loss.

    Nothing is stored. The model is in evaluation mode meanwhile; its state is restored at the end
    of the generator. If you may stop early, close it with ``contextlib.closing``.

    Raises:
        ValueError: If the ids cannot be inferred, or if ``training_step`` fails on a batch.
    """
    named = named_batches(SampleLedger(sample_ids), loader, "rows", progress=False)
    with named as batches, recording(model, recipe, None, "eval") as rows:
        for ids, batch in batches:
            _, batch_rows = record_batch(model, rows, batch, "train_loader", ids)
            yield ids, sample_gradients(batch_rows, recipe)


def sampled_rows(
    model: nn.Module,
    batches: Iterable[Any],
    recipe: Recipe,
    *,
    seed: int = 0,
    argument: str = "train_loader",
) -> Generator[Float[Tensor, "n k"], None, None]:
    """Yield the gradients for labels sampled from the model's predictions, batch by batch.

    On average, the rows' outer products sum to the Gauss-Newton matrix of the batch's loss. The
    model is in evaluation mode meanwhile; its state is restored at the end of the generator. If
    you may stop early, close it with ``contextlib.closing``.

    Raises:
        ValueError: If ``training_step`` fails on a batch, or if labels cannot be sampled for its
            loss.
    """
    with recording(model, recipe, None, "eval", "sampled") as rows:
        for number, batch in enumerate(batches):
            rows.seed(seed + number)
            _, batch_rows = record_batch(model, rows, batch, argument)
            assert batch_rows.curvature_rows is not None
            yield batch_rows.curvature_rows
