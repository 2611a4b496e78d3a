"""Queries: a query is just another, smaller recording; so is a pass over data without training.

Batches go through the user's own ``training_step`` under the recipe of the run. That is why nobody
writes a loss function again.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.data import DataLoader

from tda_lightning.batches import batch_size, batches_of, describe, transfer, with_progress
from tda_lightning.layers import survey
from tda_lightning.passes import record_batch
from tda_lightning.projectors import projector_from_dict
from tda_lightning.recipe import Recipe, ranges_of
from tda_lightning.rows import BatchRows, RowRecorder
from tda_lightning.sample_ids import IdSource, SampleLedger
from tda_lightning.step import Preconditioner, Step
from tda_lightning.stores import MemoryStore, Store, WritableStore
from tda_lightning.targets import Loss, Target, name_of, per_sample
from tda_lightning.undisturbed import undisturbed


def record_queries(
    model: nn.Module,
    queries: Any,
    *,
    like: Store,
    target: Target = Loss(),
    at: int = -1,
    mode: Literal["eval", "train"] = "eval",
    progress: bool = True,
) -> Float[Tensor, "n_query k"]:
    """Sketch the gradient of each query's loss at the weights that ``model`` has.

    Of another target, it is the gradient of the negative: what lowers it raises the target.

    Args:
        model: The LightningModule that was trained. It is left as it was.
        queries: A batch as the training loader yields them, or a ``DataLoader`` of such batches.
        like: The run to ask: queries are recorded by its recipe.
        target: What is asked about: a function of (module, batch) that returns one number per
            sample, or one per sample and token, shape ``(n, T)``, each of which is a query then.
        at: The step of it in whose coordinates.
        mode: Whether the model acts as in evaluation or as in training.
        progress: Show a progress bar over the batches of a loader.

    Returns:
        One row per query, on the CPU, shape ``(n_query, k)``; a sample's tokens lie together. Where
        the run's reduction is ``"mean"``, the loss of a batch is taken to be the mean of its
        samples' losses.

    Raises:
        ValueError: If the model's layers are not the recorded ones, or if ``training_step`` cannot
            take the queries or returns no loss, or the target not its numbers.
    """
    return query_rows(
        model,
        queries,
        like.recipe,
        target=target,
        coordinates=like.preconditioner(at),
        mode=mode,
        progress=progress,
    )


def query_rows(
    model: nn.Module,
    queries: Any,
    recipe: Recipe,
    *,
    target: Target = Loss(),
    coordinates: Preconditioner | None = None,
    mode: Literal["eval", "train"] = "eval",
    progress: bool = True,
) -> Float[Tensor, "n_query k"]:
    """Sketch the gradient of each query's loss by a recipe, where there need be no run.

    Args:
        model: The LightningModule that was trained. It is left as it was.
        queries: A batch as the training loader yields them, or a ``DataLoader`` of such batches.
        recipe: How to record.
        target: What is asked about; see :func:`record_queries`.
        coordinates: The coordinates to record in; by default those of the gradients.
        mode: Whether the model acts as in evaluation or as in training.
        progress: Show a progress bar over the batches of a loader.

    Returns:
        One row per query, on the CPU, shape ``(n_query, k)``.

    Raises:
        ValueError: If the model or the queries do not fit.
    """
    passes: Literal["one", "several"] = "one" if isinstance(target, Loss) else "several"
    with _recording(model, recipe, coordinates, mode, sampled=0.0, passes=passes) as rows:
        batches = with_progress(batches_of(queries), "queries", progress)
        if isinstance(target, Loss):
            found = [record_batch(model, rows, batch, "queries")[1] for batch in batches]
            recorded = [_own_gradients(one, recipe) for one in found]
        else:
            recorded = [_record_target(model, rows, batch, target) for batch in batches]
    if not recorded:
        raise ValueError("`queries` is an empty loader; expected at least one batch.")
    return torch.cat([one.cpu() for one in recorded])


def train_rows(
    model: nn.Module,
    loader: DataLoader[Any],
    recipe: Recipe,
    *,
    sample_ids: IdSource | None = None,
    progress: bool = True,
) -> Iterator[tuple[Int[Tensor, " n"], Float[Tensor, "n k"]]]:
    """Sketch, batch by batch, the gradient of each training sample's own loss.

    Nothing is kept. The model is in evaluation mode, and is left as it was at the end.

    Args:
        model: The LightningModule, with the weights to ask about.
        loader: The training data, in any order.
        recipe: How to record.
        sample_ids: Where a batch has its samples' ids; by default learnt from the sampler.
        progress: Show a progress bar.

    Yields:
        The ids of a batch's samples and their rows, where the model is, shape ``(n, k)``.

    Raises:
        ValueError: If the ids cannot be known, or ``training_step`` cannot take a batch.
    """
    ledger = SampleLedger(sample_ids)
    ledger.watch(loader, lambda: True)
    try:
        with _recording(model, recipe, None, "eval", sampled=0.0) as rows:
            for number, batch in enumerate(with_progress(loader, "training samples", progress)):
                named = ledger.name(batch, number)
                _, found = record_batch(model, rows, batch, "train_loader")
                yield named, _own_gradients(found, recipe)
    finally:
        ledger.release()


def _own_gradients(found: BatchRows, recipe: Recipe) -> Float[Tensor, "n k"]:
    """Return the gradients of the samples' own losses, of rows of the loss of their batch."""
    return found.rows * len(found.rows) if recipe.reduction == "mean" else found.rows


def record(
    model: nn.Module,
    loader: DataLoader[Any],
    *,
    like: Store,
    labels: Literal["given", "sampled"] = "given",
    at: int = -1,
    mode: Literal["eval", "train"] = "eval",
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
        like: The run whose recipe to record by.
        labels: ``"sampled"`` adds rows from labels drawn from the model's own predictions.
        at: The step of that run in whose coordinates.
        mode: Whether the model acts as in evaluation or as in training.
        sample_ids: Where a batch has its samples' ids; by default learnt from the sampler.
        store: Where to record to; into memory by default.
        progress: Show a progress bar.

    Raises:
        ValueError: If the model's layers are not the recorded ones, or if ``training_step`` cannot
            take the batches or returns no loss.
    """
    result = MemoryStore() if store is None else store
    ledger = SampleLedger(sample_ids)
    ledger.watch(loader, lambda: True)
    ids = ledger.train_ids
    recipe = replace(
        like.recipe,
        train_ids=None if ids is None else ranges_of(ids),
        curvature="fisher" if labels == "sampled" else "none",
        every_n_steps=1,
    )
    result.begin(recipe)
    facts = like[at]
    try:
        sampled = float(labels == "sampled")
        with _recording(model, like.recipe, like.preconditioner(at), mode, sampled) as rows:
            for number, batch in enumerate(with_progress(loader, "recording", progress)):
                named = ledger.name(batch, number)
                rows.seed(number)
                _, found = record_batch(model, rows, batch, "loader")
                result.append(_step(number, facts, named, found, like))
    finally:
        ledger.release()
        result.seal()
    return result


def _step(
    number: int, facts: Step, sample_ids: Int[Tensor, " n"], found: BatchRows, like: Store
) -> Step:
    n = len(sample_ids)
    weight = 1 / n if like.recipe.reduction == "mean" else 1.0
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
        preconditioner=like.preconditioner() if number == 0 else None,
    )


def _on_cpu(found: Tensor | None) -> Tensor | None:
    return None if found is None else found.cpu()


@contextmanager
def _recording(
    model: nn.Module,
    recipe: Recipe,
    coordinates: Preconditioner | None,
    mode: Literal["eval", "train"],
    sampled: float,
    passes: Literal["one", "several"] = "one",
) -> Iterator[RowRecorder]:
    """Record the model by a recipe, and leave it as it was."""
    surveyed = survey(model, leave_out=[entry.name for entry in recipe.left_out])
    recipe.require_blocks(surveyed.blocks, type(model).__name__)
    projector = projector_from_dict(recipe.projector)
    rows = RowRecorder(
        model, surveyed, recipe.batch_dims, projector, recipe.torch_dtype, sampled, passes
    )
    if coordinates is not None:
        rows.precondition(coordinates)
    with undisturbed(model, mode), rows, torch.enable_grad():
        yield rows


def _record_target(
    model: nn.Module, rows: RowRecorder, batch: Any, target: Target
) -> Float[Tensor, "n_query k"]:
    """Record the gradient of the negative target, token by token, each for all samples at once."""
    n = batch_size(batch, "queries")
    rows.start(n)
    try:
        fallen = -per_sample(target, model, transfer(model, batch), n)  # (n, T)
        rows.listen(fallen.sum())
        trained = [one for one in model.parameters() if one.requires_grad]
        tokens = []
        for number, one in enumerate(fallen.unbind(dim=1), start=1):
            more = number < fallen.shape[1]
            torch.autograd.grad(one.sum(), trained, allow_unused=True, retain_graph=more)
            tokens.append(rows.take())
    except (RuntimeError, ValueError, TypeError, LookupError) as error:
        raise ValueError(
            f"`queries` could not be asked about `{name_of(target)}`: expected a batch that the "
            f"target can take; got {describe(batch)}, and it said: {error}"
        ) from error
    finally:
        rows.finish()
    return torch.stack(tokens, dim=1).flatten(0, 1)
