"""Record queries: the gradient of each query's loss or target, as a row.

Queries go through the user's own ``training_step`` under the recipe of the run, like training
batches. Users write no second loss function.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tda_lightning.arguments import describe, name_of, require_choice
from tda_lightning.gradients.row_recorder import RowRecorder
from tda_lightning.passes.batches import (
    batch_size,
    batches_of,
    record_batch,
    recording,
    sample_gradients,
    trained_parameters,
    transfer,
    with_progress,
)
from tda_lightning.passes.model_state import Mode, require_finite_weights, swapped_weights
from tda_lightning.passes.targets import Loss, Target, per_sample
from tda_lightning.stores import Store, open_store_at
from tda_lightning.stores.recipe import Recipe
from tda_lightning.stores.snapshots import Moment, later_snapshots, position_of
from tda_lightning.stores.step import Preconditioner


def record_queries(
    model: nn.Module,
    queries: Any,
    *,
    like: str | Path | Store,
    target: Target = Loss(),
    at: int = -1,
    mode: Mode = "eval",
    progress: bool = True,
) -> Float[Tensor, "n_query k"]:
    """Sketch the gradient of each query's loss at the current weights of ``model``.

    For another target, record the gradient of its negative: lowering the negative raises it.

    Args:
        model: The trained LightningModule. Its state is restored afterwards.
        queries: A batch as the training loader yields it, or a ``DataLoader`` of such batches.
        like: The run whose recipe the queries are recorded by: its folder or a store.
        target: The quantity to attribute. A function of (module, batch) that returns one number per
            sample. It may return one per sample and token, shape ``(n, T)``; each is then a query.
        at: Position of the step of the run whose coordinates are used; -1 for the last.
        mode: Whether the model is in evaluation or training mode.
        progress: Show a progress bar over the batches of a loader.

    Returns:
        One row per query, on the CPU, shape ``(n_query, k)``; a sample's tokens are consecutive. If
        the run's reduction is ``"mean"``, a batch's loss is assumed to be the mean of its samples'
        losses.

    Raises:
        FileNotFoundError: If there is no run at the path.
        ValueError: If the model's layers are not the recorded ones, or if ``training_step`` or the
            target fails on the queries or returns a wrong result.
    """
    run = open_store_at(like, "like", at)
    return query_rows(
        model,
        queries,
        run.recipe,
        target=target,
        preconditioner=run.preconditioner(at),
        mode=mode,
        progress=progress,
    )


def query_rows(
    model: nn.Module,
    queries: Any,
    recipe: Recipe,
    *,
    target: Target = Loss(),
    preconditioner: Preconditioner | None = None,
    mode: Mode = "eval",
    progress: bool = True,
) -> Float[Tensor, "n_query k"]:
    """Sketch the gradient of each query's loss by a recipe, without a run.

    Args:
        model: The trained LightningModule. Its state is restored afterwards.
        queries: A batch as the training loader yields it, or a ``DataLoader`` of such batches.
        recipe: The recipe to record by.
        target: The quantity to attribute; see :func:`record_queries`.
        preconditioner: The coordinates of the rows; by default those of the gradients.
        mode: Whether the model is in evaluation or training mode.
        progress: Show a progress bar over the batches of a loader.

    Returns:
        One row per query, on the CPU, shape ``(n_query, k)``.

    Raises:
        ValueError: If the model or the queries do not match the recipe.
    """
    require_choice("mode", mode, Mode)
    with recording(model, recipe, preconditioner, mode, sampled=0.0) as rows:
        batches = with_progress(batches_of(queries), "queries", progress)
        if isinstance(target, Loss):
            batch_rows = [record_batch(model, rows, batch, "queries")[1] for batch in batches]
            gradient_parts = [sample_gradients(part, recipe) for part in batch_rows]
        else:
            gradient_parts = [_record_target(model, rows, batch, target) for batch in batches]
    if not gradient_parts:
        raise ValueError("`queries` is an empty loader; expected at least one batch.")
    gradients = torch.cat([part.cpu() for part in gradient_parts])
    _require_finite(gradients, model)
    return gradients


def _require_finite(rows: Float[Tensor, "n_query k"], model: nn.Module) -> None:
    if torch.isfinite(rows).all():
        return
    require_finite_weights(model)
    query = int((~torch.isfinite(rows).all(dim=1)).nonzero()[0])
    raise ValueError(
        f"The gradient of query {query} is not finite, although the weights are. Expected a finite "
        "one; look for NaN or infinity in the inputs and targets of this query."
    )


def _record_target(
    model: nn.Module, rows: RowRecorder, batch: Any, target: Target
) -> Float[Tensor, "n_query k"]:
    """Record the gradient of the negative target, one token of all samples at a time."""
    n = batch_size(batch, "queries")
    rows.start(n)
    try:
        negatives = -per_sample(target, model, transfer(model, batch), n)  # (n, T)
        rows.start_backward(negatives.sum())
        trained = trained_parameters(model)
        token_rows = []
        for number, negative in enumerate(negatives.unbind(dim=1), start=1):
            retain = number < negatives.shape[1]
            torch.autograd.grad(negative.sum(), trained, allow_unused=True, retain_graph=retain)
            token_rows.append(rows.take())
    except (RuntimeError, ValueError, TypeError, LookupError) as error:
        raise ValueError(
            f"The target `{name_of(target)}` failed on `queries`: expected a batch that the target "
            f"accepts; got {describe(batch)}. The error was: {error}"
        ) from error
    finally:
        rows.end_backward()
    return torch.stack(token_rows, dim=1).flatten(0, 1)


# Records the rows of the queries, in the coordinates of the step at a position.
RecordRows = Callable[[int], Float[Tensor, "n_query k"]]


def mean_rows_at(
    store: Store, model: nn.Module, at: Moment, record_rows: RecordRows
) -> Float[Tensor, "n_query k"]:
    """Return the query rows at the weights ``at``; for ``"snapshots"``, the mean of later ones."""
    if at in ("now", "model"):
        return record_rows(-1)
    if isinstance(at, str) and at != "snapshots":
        raise ValueError(
            f'`at` is {at!r}; expected "now", "model", "snapshots", or the index of a step that '
            "has a snapshot."
        )
    snapshots = later_snapshots(store) if at == "snapshots" else [at]
    return torch.stack(list(rows_at_snapshots(store, model, snapshots, record_rows))).mean(dim=0)


def rows_at_snapshots(
    store: Store, model: nn.Module, snapshots: Sequence[int], record_rows: RecordRows
) -> Iterator[Float[Tensor, "n_query k"]]:
    """Yield the query rows at each snapshot; the model's weights are restored afterwards."""
    for snapshot in snapshots:
        with swapped_weights(model, store.weights_at(snapshot)):
            yield record_rows(position_of(store, snapshot))
