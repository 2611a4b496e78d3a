"""Rank agreement: Spearman's correlation of two sets of scores, per query."""

from __future__ import annotations

import torch
from jaxtyping import Float64
from torch import Tensor

from tda_lightning.metrics.checks import describe
from tda_lightning.metrics.ranks import rank_correlation
from tda_lightning.results.scores import Scores


def rank_agreement(one: Scores, other: Scores) -> Float64[Tensor, " n_query"]:
    """Return Spearman's rank correlation of two sets of scores, for each query.

    Args:
        one: Scores of some queries.
        other: Scores of the same queries and training samples, from another method or training.

    Returns:
        Correlations, shape ``(n_query,)``: 1 for the same order, -1 for the reverse. Ties share
        their average rank. NaN where either row of scores is constant or holds NaN.

    Raises:
        ValueError: If the queries or the training samples differ.
    """
    for name, scores in (("one", one), ("other", other)):
        if not isinstance(scores, Scores):
            raise ValueError(
                f"`{name}` is {describe(scores)}; expected `Scores`, which hold the ids of their "
                "queries and training samples. Pass the result of `attribute`."
            )
    for name in ("query_ids", "train_ids"):
        if not torch.equal(getattr(one, name), getattr(other, name)):
            raise ValueError(
                f"The two `Scores` differ in their `{name}`; expected the same. Attribute the same "
                "queries to the same training set."
            )
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
