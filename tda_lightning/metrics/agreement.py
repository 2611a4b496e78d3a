"""Do two sets of scores rank the training samples alike? Spearman's rank correlation, per query."""

from __future__ import annotations

import torch
from jaxtyping import Float64
from torch import Tensor

from tda_lightning.metrics.checks import said
from tda_lightning.metrics.ranks import rank_correlation
from tda_lightning.results.scores import Scores


def rank_agreement(one: Scores, other: Scores) -> Float64[Tensor, " n_query"]:
    """Return Spearman's rank correlation of two sets of scores, for each query.

    Args:
        one: Scores of some queries.
        other: Scores of the same queries and training samples: another method, or another training.

    Returns:
        1 where they rank alike, -1 where one reverses the other, ties at their average rank; not a
        number where either is constant, and so ranks nothing, or holds NaN.

    Raises:
        ValueError: If they are not about the same queries and training samples.
    """
    for name, scores in (("one", one), ("other", other)):
        if not isinstance(scores, Scores):
            raise ValueError(
                f"`{name}` is {said(scores)}; expected `Scores`, which know their queries and "
                "training samples, such as `attribute` returns."
            )
    for name in ("query_ids", "train_ids"):
        if not torch.equal(getattr(one, name), getattr(other, name)):
            raise ValueError(
                f"The two `Scores` differ in their `{name}`; expected the same. Attribute the same "
                "queries to the same training set."
            )
    return rank_correlation(one.values, other.values)
