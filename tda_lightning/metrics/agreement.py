"""Rank agreement: Spearman's rank correlation of two sets of scores, per query."""

from __future__ import annotations

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from tda_lightning.metrics.checks import describe
from tda_lightning.results.joining import require_same_ids
from tda_lightning.results.scores import Scores


def rank_agreement(one: Scores, other: Scores) -> Float64[Tensor, " n_query"]:
    """Return Spearman's rank correlation of two sets of scores, for each query.

    Args:
        one: Scores of some queries.
        other: Scores of the same queries and training samples, from another method or training.

    Returns:
        Correlations, shape ``(n_query,)``. They are 1 for the same order, and -1 for the
        reverse. Ties share their average rank. NaN where either row of scores is constant or holds
        NaN.

    Raises:
        ValueError: If the queries or the training samples differ.
    """
    for name, scores in (("one", one), ("other", other)):
        if not isinstance(scores, Scores):
            raise ValueError(
                f"`{name}` is {describe(scores)}; expected `Scores`, which hold the ids of their "
                "queries and training samples. Pass the result of `attribute`."
            )
    require_same_ids([one, other], ("query_ids", "train_ids"), Scores)
    return rank_correlation(one.values, other.values)


def model_randomization(scores: Scores, randomized: Scores) -> float:
    """Return how little scores depend on what the model has learned; near 0 is good.

    Adebayo et al. (2018), "Sanity Checks for Saliency Maps", applied to attributions by Hanawa et
    al. (2021).

    Args:
        scores: Scores of some queries.
        randomized: Scores of the same queries from the model with random weights.

    Returns:
        Mean rank correlation over the queries; queries without one (NaN) are left out.

    Raises:
        ValueError: If the queries or the training samples differ.
    """
    return float(rank_agreement(scores, randomized).nanmean())


def rank_correlation(
    first: Float[Tensor, "n m"], second: Float[Tensor, "n m"]
) -> Float64[Tensor, " n"]:
    """Return Spearman's rank correlation of each pair of rows; ties share their mean rank.

    It is NaN where either row is constant or holds NaN.

    >>> import torch
    >>> rank_correlation(torch.tensor([[1.0, 2.0, 9.0]]), torch.tensor([[3.0, 5.0, 7.0]]))
    tensor([1.], dtype=torch.float64)
    """
    first_ranks, second_ranks = _centred_ranks(first), _centred_ranks(second)
    products = (first_ranks * second_ranks).sum(dim=1)
    norms = (first_ranks.square().sum(dim=1) * second_ranks.square().sum(dim=1)).sqrt()
    return products / norms


def _centred_ranks(values: Float[Tensor, "n m"]) -> Float64[Tensor, "n m"]:
    """Return ranks minus their mean: zeros for a constant row, NaN for a row with NaN."""
    values = values.contiguous()
    ordered = values.sort(dim=1).values
    below = torch.searchsorted(ordered, values)
    not_above = torch.searchsorted(ordered, values, right=True)
    ranks = (below + not_above - values.shape[1]).double() / 2
    return ranks.masked_fill(values.isnan().any(dim=1, keepdim=True), torch.nan)
