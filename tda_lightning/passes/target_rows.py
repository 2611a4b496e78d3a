"""Record the rows of a target: one per sample, or one per sample and token."""

from __future__ import annotations

from collections.abc import Sized
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from tda_lightning.gradients.row_recorder import RowRecorder
from tda_lightning.passes.batch_contents import batch_size
from tda_lightning.passes.batches import remedy_for, trained_parameters, transfer
from tda_lightning.passes.targets import Target, per_sample, queried_tokens
from tda_lightning.stores.arguments import describe, name_of


@dataclass(frozen=True)
class BatchQueries:
    """The queries of a batch.

    Attributes:
        rows: One row per query, shape ``(n_query, k)``.
        samples: Position of each query's sample in the batch, shape ``(n_query,)``.
        tokens: Position of its token in the sample, or ``None`` if the target is per sample.
        losses: Loss of each query, if the target is the loss and its terms are known.
    """

    rows: Float[Tensor, "n_query k"]
    samples: Int[Tensor, " n_query"]
    tokens: Int[Tensor, " n_query"] | None
    losses: Float[Tensor, " n_query"] | None = None


def record_target(
    model: nn.Module, rows: RowRecorder, batch: Any, target: Target, ids: Sized | None = None
) -> BatchQueries:
    """Record the gradient of the negative target, one token of all samples at a time.

    A sample's tokens are consecutive. The ``.grad`` of the model's parameters does not change.

    Raises:
        ValueError: If the target fails on the batch or returns a wrong result.
    """
    n = batch_size(batch, "queries", ids)
    rows.start(n)
    try:
        moved = transfer(model, batch)
        values, is_per_token = per_sample(target, model, moved, n)
        is_query = queried_tokens(target, moved, values)
        recorded = _token_rows(model, rows, -values, is_query)
    except (RuntimeError, ValueError, TypeError, LookupError) as error:
        raise ValueError(
            f"The target `{name_of(target)}` failed on `queries`: expected a batch that the target "
            f"accepts; got {describe(batch)}. The error was: {error}{remedy_for(error)}"
        ) from error
    finally:
        rows.end_backward()
    samples, tokens = is_query.nonzero(as_tuple=True)
    # With a shift, the first token has no logits that predict it.
    tokens = tokens + int(getattr(target, "shift", False))
    return BatchQueries(recorded, samples, tokens if is_per_token else None)


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
