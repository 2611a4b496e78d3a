"""Record queries: the gradient of each query's loss or target, as a row.

Queries go through the user's own ``training_step`` under the recipe of the run, like training
batches. Users write no second loss function.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence, Sized
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from tda_lightning.gradients.row_recorder import Labels, RowRecorder
from tda_lightning.passes.batch_contents import batch_size, require_batches
from tda_lightning.passes.batches import (
    record_batch,
    recording,
    sample_gradients,
    step_errors,
    trained_parameters,
    transfer,
)
from tda_lightning.passes.model_state import (
    Mode,
    require_finite_weights,
    swapped_weights,
    warn_of_other_weights,
)
from tda_lightning.passes.query_batches import identified
from tda_lightning.passes.targets import Loss, Target, per_sample, queried_tokens, require_target
from tda_lightning.stores import Store, open_store_at
from tda_lightning.stores.arguments import name_of, require_choice
from tda_lightning.stores.recipe import Recipe
from tda_lightning.stores.snapshots import Moment, later_snapshots, position_of
from tda_lightning.stores.step import Preconditioner


def record_queries(
    model: nn.Module,
    queries: Any,
    *,
    like: str | Path | Store,
    target: Target = Loss(),
    at: int | Literal["model"] = -1,
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
            sample. It may return one per sample and token, shape ``(n, T)``; each is then a query,
            except those whose label is -100.
        at: Position of the step of the run whose coordinates are used. The default -1 is the last,
            and warns if the model does not have the weights at the end of the recorded training.
            ``"model"`` uses the same coordinates without a warning.
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
    position = -1 if at == "model" else at
    run = open_store_at(like, "like", position)
    if at == -1:
        warn_of_other_weights(model, run.final_fingerprint)
    return identified_rows(
        model,
        queries,
        run.recipe,
        target=target,
        preconditioner=run.preconditioner(position),
        mode=mode,
        progress=progress,
    ).rows


@dataclass(frozen=True)
class QueryRows:
    """The rows of queries, with their samples and tokens.

    Attributes:
        rows: One row per query, on the CPU, shape ``(n_query, k)``.
        ids: Ids of the samples: indices into the dataset of a loader, below any ``Subset``, or
            positions, where there is no loader or its order is unknown. Shape ``(n_query,)``.
            Those of a batch are positions in it.
        tokens: Position of each query's token in its sample, if the target is per token.
        losses: Loss of each query on the CPU, if labels are read, the target is the loss, and its
            terms are known.
    """

    rows: Float[Tensor, "n_query k"]
    ids: Int[Tensor, " n_query"]
    tokens: Int[Tensor, " n_query"] | None = None
    losses: Float[Tensor, " n_query"] | None = None


def identified_rows(
    model: nn.Module,
    queries: Any,
    recipe: Recipe,
    *,
    target: Target = Loss(),
    preconditioner: Preconditioner | None = None,
    mode: Mode = "eval",
    labels: Labels = "unread",
    layers: Sequence[str] | None = None,
    progress: bool = True,
) -> QueryRows:
    """Sketch the gradient of each query's loss by a recipe, without a run.

    The arguments are those of :func:`record_queries`. The coordinates of the rows are by default
    those of the gradients. With ``layers``, only the gradients of these layers count; with labels
    that are ``"given"``, the queries' losses are returned too.

    Raises:
        ValueError: If the model or the queries do not match the recipe, or if no token counts.
    """
    require_choice("mode", mode, Mode)
    parts: list[QueryRows] = []
    sizes, ids = [], []
    with recording(model, recipe, preconditioner, mode, labels, layers) as rows:
        for batch_ids, batch in identified(queries, progress=progress):
            if isinstance(target, Loss):
                batch_rows = record_batch(model, rows, batch, "queries", batch_ids)[1]
                recorded = sample_gradients(batch_rows, recipe)
                losses = batch_rows.loss.facts().losses
                parts.append(QueryRows(recorded, torch.arange(len(recorded)), None, losses))
            else:
                parts.append(_record_target(model, rows, batch, target, batch_ids))
            sizes.append(batch_size(batch, "queries", batch_ids))
            ids.append(batch_ids)
    require_batches(parts, "queries")
    if not sum(len(part.rows) for part in parts):
        raise ValueError(
            "All labels of `queries` are -100, so that no token counts; expected at least one "
            "label. Label the tokens to query."
        )
    pairs = zip(parts, _sample_ids(ids, sizes), strict=True)
    result = joined_rows([replace(part, ids=named[part.ids]) for part, named in pairs])
    _require_finite(result.rows, model)
    return result


def _record_target(
    model: nn.Module, rows: RowRecorder, batch: Any, target: Target, ids: Sized | None = None
) -> QueryRows:
    """Record the gradient of the negative target, one token of all samples at a time.

    A sample's tokens are consecutive. The ``.grad`` of the model's parameters does not change.

    Raises:
        ValueError: If the target is no function, fails on the batch or returns a wrong result.
    """
    require_target(target)
    n = batch_size(batch, "queries", ids)
    rows.start(n)
    failure = (
        f"The target `{name_of(target)}` failed on `queries`: expected a batch that it accepts"
    )
    try:
        with step_errors(failure, batch, model):
            moved = transfer(model, batch)
            values, is_per_token = per_sample(target, model, moved, n)
            is_query = queried_tokens(target, moved, values)
            recorded = _token_rows(model, rows, -values, is_query)
    finally:
        rows.end_backward()
    samples, tokens = is_query.nonzero(as_tuple=True)
    # With a shift, the first token has no logits that predict it.
    tokens = tokens + int(getattr(target, "shift", False))
    return QueryRows(recorded, samples, tokens if is_per_token else None)


def _token_rows(
    model: nn.Module,
    rows: RowRecorder,
    negatives: Float[Tensor, "n tokens"],
    is_query: Bool[Tensor, "n tokens"],
) -> Float[Tensor, "n_query k"]:
    """Return the gradients of the values that are queries, in one pass per token of a sample."""
    columns = is_query.any(dim=0).nonzero()[:, 0].tolist()
    if not columns:
        return torch.empty(0, rows.dimension)
    rows.start_backward(negatives.sum())
    trained, last = trained_parameters(model), columns[-1]
    token_rows = []
    for column in columns:
        total = negatives[:, column].sum()
        torch.autograd.grad(total, trained, allow_unused=True, retain_graph=column != last)
        token_rows.append(rows.take())
    chosen: Tensor = torch.stack(token_rows, dim=1)[is_query[:, columns]]
    return chosen


def _sample_ids(ids: Sequence[Tensor | None], sizes: Sequence[int]) -> list[Int[Tensor, " n"]]:
    """Return the ids of each batch's samples: the inferred ones, or their positions."""
    known = [batch_ids for batch_ids in ids if batch_ids is not None]
    if list(map(len, known)) == list(sizes):
        return known
    return list(torch.split(torch.arange(sum(sizes)), list(sizes)))


def joined_rows(parts: Sequence[QueryRows]) -> QueryRows:
    """Return the queries of all parts, one part after the other."""
    tokens = [part.tokens for part in parts if part.tokens is not None]
    losses = [part.losses.cpu() for part in parts if part.losses is not None]
    return QueryRows(
        torch.cat([part.rows.cpu() for part in parts]),
        torch.cat([part.ids for part in parts]),
        torch.cat(tokens) if tokens else None,
        torch.cat(losses) if len(losses) == len(parts) else None,
    )


def checked_for_zeros(queries: QueryRows) -> QueryRows:
    """Warn of queries whose gradient is zero, since they have no proponents; return all."""
    zero = ~queries.rows.any(dim=1)
    if zero.any():
        warnings.warn(
            f"{int(zero.sum())} of {len(zero)} queries have a gradient of zero, the first of them "
            f"query {int(queries.ids[zero][0])}; so all of their scores are zero. Expected a loss "
            "that depends on the parameters: their labels may be ignored, or the loss flat there.",
            stacklevel=4,
        )
    return queries


def _require_finite(rows: Float[Tensor, "n_query k"], model: nn.Module) -> None:
    if torch.isfinite(rows).all():
        return
    require_finite_weights(model)
    query = int((~torch.isfinite(rows).all(dim=1)).nonzero()[0])
    raise ValueError(
        f"The gradient of query {query} is not finite, although the weights are. Expected a finite "
        "one; look for NaN or infinity in the inputs and targets of this query."
    )


# Records the queries at the current weights, in the coordinates of the step at a position.
Record = Callable[[int], QueryRows]


def queries_at(store: Store, model: nn.Module, at: Moment, record: Record) -> QueryRows:
    """Return the queries at the weights ``at``; for ``"snapshots"``, the mean at later ones."""
    if at in ("now", "model"):
        return record(-1)
    if isinstance(at, str) and at != "snapshots":
        raise ValueError(
            f'`at` is {at!r}; expected "now", "model", "snapshots", or the index of a step that '
            "has a snapshot."
        )
    snapshots = later_snapshots(store) if at == "snapshots" else [at]
    passes = []
    for snapshot in snapshots:
        with swapped_weights(model, store.weights_at(snapshot)):
            passes.append(record(position_of(store, snapshot)))
    mean = torch.stack([part.rows for part in passes]).mean(dim=0)
    return replace(passes[0], rows=mean)
