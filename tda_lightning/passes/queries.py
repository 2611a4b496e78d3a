"""Queries: a query is just another, smaller recording.

Batches go through the user's own ``training_step`` under the recipe of the run. That is why nobody
writes a loss function again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tda_lightning.arguments import require_choice
from tda_lightning.gradients.row_recorder import RowRecorder
from tda_lightning.passes.batch_rows import own_gradients, record_batch, recording
from tda_lightning.passes.batches import batch_size, batches_of, describe, with_progress
from tda_lightning.passes.model_state import Mode, swapped_weights
from tda_lightning.passes.targets import Loss, Target, name_of, per_sample
from tda_lightning.passes.training_step import require_finite_weights, transfer
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
    """Sketch the gradient of each query's loss at the weights that ``model`` has.

    Of another target, it is the gradient of the negative: what lowers it raises the target.

    Args:
        model: The LightningModule that was trained. It is left as it was.
        queries: A batch as the training loader yields them, or a ``DataLoader`` of such batches.
        like: The run to ask, its folder or a store: queries are recorded by its recipe.
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
        FileNotFoundError: If there is no run at the path.
        ValueError: If the model's layers are not the recorded ones, or if ``training_step`` cannot
            take the queries or returns no loss, or the target not its numbers.
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
    """Sketch the gradient of each query's loss by a recipe, where there need be no run.

    Args:
        model: The LightningModule that was trained. It is left as it was.
        queries: A batch as the training loader yields them, or a ``DataLoader`` of such batches.
        recipe: How to record.
        target: What is asked about; see :func:`record_queries`.
        preconditioner: The coordinates to record in; by default those of the gradients.
        mode: Whether the model acts as in evaluation or as in training.
        progress: Show a progress bar over the batches of a loader.

    Returns:
        One row per query, on the CPU, shape ``(n_query, k)``.

    Raises:
        ValueError: If the model or the queries do not fit.
    """
    require_choice("mode", mode, Mode)
    passes: Literal["one", "several"] = "one" if isinstance(target, Loss) else "several"
    with recording(model, recipe, preconditioner, mode, sampled=0.0, passes=passes) as rows:
        batches = with_progress(batches_of(queries), "queries", progress)
        if isinstance(target, Loss):
            found = [record_batch(model, rows, batch, "queries")[1] for batch in batches]
            recorded = [own_gradients(one, recipe) for one in found]
        else:
            recorded = [_record_target(model, rows, batch, target) for batch in batches]
    if not recorded:
        raise ValueError("`queries` is an empty loader; expected at least one batch.")
    gradients = torch.cat([one.cpu() for one in recorded])
    _require_finite(gradients, model)
    return gradients


def _require_finite(rows: Float[Tensor, "n_query k"], model: nn.Module) -> None:
    if torch.isfinite(rows).all():
        return
    require_finite_weights(model)
    query = int((~torch.isfinite(rows).all(dim=1)).nonzero()[0])
    raise ValueError(
        f"The gradient of query {query} is not finite, though the weights are; expected a query "
        "whose loss has one. Look for NaN or infinity in its inputs and targets."
    )


def _record_target(
    model: nn.Module, rows: RowRecorder, batch: Any, target: Target
) -> Float[Tensor, "n_query k"]:
    """Record the gradient of the negative target, token by token, each for all samples at once."""
    n = batch_size(batch, "queries")
    rows.start(n)
    try:
        fallen = -per_sample(target, model, transfer(model, batch), n)  # (n, T)
        rows.start_backward(fallen.sum())
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
        rows.end_backward()
    return torch.stack(tokens, dim=1).flatten(0, 1)


# Takes the rows of the queries, in the coordinates of the step at a position.
Ask = Callable[[int], Float[Tensor, "n_query k"]]


def mean_rows_at(
    store: Store, model: nn.Module, at: Moment, ask: Ask
) -> Float[Tensor, "n_query k"]:
    """Ask at some weights; along the way, at the later snapshots, and average."""
    if at == "now":
        return ask(-1)
    if isinstance(at, str) and at != "snapshots":
        raise ValueError(
            f'`at` is {at!r}; expected "now", "snapshots", or the index of a step that has a '
            "snapshot."
        )
    chosen = later_snapshots(store) if at == "snapshots" else [at]
    return torch.stack(list(rows_at_snapshots(store, model, chosen, ask))).mean(dim=0)


def rows_at_snapshots(
    store: Store, model: nn.Module, snapshots: Sequence[int], ask: Ask
) -> Iterator[Float[Tensor, "n_query k"]]:
    """Yield the query rows at each snapshot; the model's own weights are restored afterwards."""
    for snapshot in snapshots:
        with swapped_weights(model, store.weights_at(snapshot)):
            yield ask(position_of(store, snapshot))
