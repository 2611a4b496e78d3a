"""Do two sets of scores rank the training samples alike? Spearman's rank correlation, per query."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from tda_lightning.scores import Scores


def rank_agreement(one: Scores, other: Scores) -> Float[Tensor, " n_query"]:
    """Return Spearman's rank correlation of two sets of scores, for each query.

    Args:
        one: Scores of some queries.
        other: Scores of the same queries and training samples: another method, or another training.

    Returns:
        1 where they rank alike, -1 where one reverses the other, 0 where either is constant.

    Raises:
        ValueError: If they are not about the same queries and training samples.
    """
    for name in ("query_ids", "train_ids"):
        if not torch.equal(getattr(one, name), getattr(other, name)):
            raise ValueError(
                f"The two `Scores` differ in their `{name}`; expected the same. Attribute the same "
                "queries to the same training set."
            )
    ours, theirs = _centred_ranks(one.values), _centred_ranks(other.values)
    norms = ours.norm(dim=1) * theirs.norm(dim=1)
    agreement: Tensor = (ours * theirs).sum(dim=1) / norms.clamp_min(1e-30)
    return agreement


def _centred_ranks(values: Float[Tensor, "n m"]) -> Float[Tensor, "n m"]:
    """Return ranks less their mean; equal values share the mean of their ranks."""
    values = values.contiguous()
    ordered = values.sort(dim=1).values
    below = torch.searchsorted(ordered, values)
    not_above = torch.searchsorted(ordered, values, right=True)
    ranks: Tensor = (below + not_above - values.shape[1]).double() / 2
    return ranks
