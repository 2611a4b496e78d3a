r"""Retrieval: are the right training samples at the top of the ranking?

Mean reciprocal rank, recall at k and tail patch: Akyürek et al. (2022), "Tracing Knowledge in
Language Models Back to the Training Data", sec. 4; Chang et al. (2024), "Scalable Influence and
Fact Tracing for Large Language Model Pretraining", sec. 4. Top-k cardinality: Barshan et al.
(2020), "RelatIF: Identifying Explanatory Training Samples via Relative Influence", sec. 5.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Float64, Int64
from torch import Tensor

from tda_lightning.metrics.checks import require_mask, require_numbers, require_rankable
from tda_lightning.results.ranking import require_rank


def mean_reciprocal_rank(
    scores: Float[Tensor, "n_query n_train"], relevant: Bool[Tensor, "n_query n_train"]
) -> float:
    """Return the mean over queries of 1 / (rank of the best relevant training sample).

    Args:
        scores: Scores, positive for proponents, shape ``(n_query, n_train)``.
        relevant: Which training samples are right for each query, shape ``(n_query, n_train)``.

    Returns:
        A number from 0 to 1. A query without relevant samples counts as 0. A relevant sample ranks
        below the other samples with an equal score, so constant scores gain nothing.

    Raises:
        ValueError: If an argument has another type or shape, or a score is NaN.

    >>> import torch
    >>> scores = torch.tensor([[3.0, 2.0, 1.0], [3.0, 2.0, 1.0]])
    >>> relevant = torch.tensor([[True, False, False], [False, True, True]])
    >>> mean_reciprocal_rank(scores, relevant)
    0.75
    """
    ranks = _first_ranks(scores, relevant)
    return float(torch.where(ranks > 0, 1 / ranks.double(), 0).mean())


def recall_at_k(
    scores: Float[Tensor, "n_query n_train"], relevant: Bool[Tensor, "n_query n_train"], k: int
) -> float:
    """Return the share of queries with a relevant training sample among their ``k`` proponents.

    Args:
        scores: See :func:`mean_reciprocal_rank`.
        relevant: See :func:`mean_reciprocal_rank`.
        k: Number of proponents per query.

    Raises:
        ValueError: If an argument has another type or shape.

    >>> import torch
    >>> relevant = torch.tensor([[False, True, True]])
    >>> recall_at_k(torch.tensor([[3.0, 2.0, 1.0]]), relevant, k=1)
    0.0
    """
    ranks = _first_ranks(scores, relevant)
    require_rank(k, scores.shape[1])
    return float(((ranks > 0) & (ranks <= k)).double().mean())


def top_k_cardinality(scores: Float[Tensor, "n_query n_train"], k: int = 1) -> float:
    """Return the number of distinct samples among all ``k`` proponents, as a share of all places.

    It is 1 if no two queries share a proponent, and small if the same few training samples, such
    as outliers, are on top for every query.

    Args:
        scores: Scores, positive for proponents, shape ``(n_query, n_train)``.
        k: Number of proponents per query.

    Raises:
        ValueError: If an argument has another type or shape.

    >>> import torch
    >>> top_k_cardinality(torch.tensor([[3.0, 2.0, 1.0], [4.0, 2.0, 1.0]]), k=1)
    0.5
    """
    require_rankable("scores", scores, 2, "attribute(...).values")
    nearest = scores.topk(require_rank(k, scores.shape[1]), dim=1).indices
    return len(torch.unique(nearest)) / nearest.numel()


def tail_patch(
    before: Float[Tensor, " n_query"], after: Float[Tensor, "n_query k"]
) -> Float64[Tensor, " n_query"]:
    """Return the mean gain in a target's probability from one more step on each proponent.

    Args:
        before: Log-probability of each query's target under the final model, shape ``(n_query,)``.
        after: The same after one step on each of its ``k`` proponents alone, shape
            ``(n_query, k)``.

    Returns:
        Gains in probability, shape ``(n_query,)``; positive if proponents raise it.

    Raises:
        ValueError: If an argument has another type or shape.

    >>> import torch
    >>> half, quarter = torch.tensor([[0.5]]).log(), torch.tensor([0.25]).log()
    >>> tail_patch(quarter, half)
    tensor([0.2500], dtype=torch.float64)
    """
    require_numbers("before", before, 1, "log_probabilities")
    require_numbers("after", after, 2, "torch.stack(log_probabilities_of_each_step, dim=1)")
    if len(before) != len(after):
        raise ValueError(
            f"`before` is for {len(before)} queries and `after` for {len(after)}; expected the "
            "same queries in both."
        )
    return (after.double().exp() - before.double().exp()[:, None]).mean(dim=1)


def _first_ranks(
    scores: Float[Tensor, "n_query n_train"], relevant: Bool[Tensor, "n_query n_train"]
) -> Int64[Tensor, " n_query"]:
    """Return the rank of each query's best relevant sample, from 1; 0 if there is none."""
    require_rankable("scores", scores, 2, "attribute(...).values")
    require_mask("relevant", relevant, tuple(scores.shape))
    best = scores.masked_fill(~relevant, -torch.inf).amax(dim=1, keepdim=True)
    ranks = 1 + ((scores >= best) & ~relevant).sum(dim=1)
    return torch.where(relevant.any(dim=1), ranks, 0)
