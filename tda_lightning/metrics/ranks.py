"""Ranks: Spearman's correlation, row by row."""

from __future__ import annotations

import torch
from jaxtyping import Float, Float64
from torch import Tensor


def rank_correlation(
    one: Float[Tensor, "n m"], other: Float[Tensor, "n m"]
) -> Float64[Tensor, " n"]:
    """Return Spearman's rank correlation of each row with the other's; ties share their mean rank.

    It is not a number where one of the two rows is constant, since nothing is ranked there, nor
    where one holds NaN, which has no rank.

    >>> import torch
    >>> rank_correlation(torch.tensor([[1.0, 2.0, 9.0]]), torch.tensor([[3.0, 5.0, 7.0]]))
    tensor([1.], dtype=torch.float64)
    """
    ours, theirs = _centred_ranks(one), _centred_ranks(other)
    products = (ours * theirs).sum(dim=1)
    return products / (ours.square().sum(dim=1) * theirs.square().sum(dim=1)).sqrt()


def _centred_ranks(values: Float[Tensor, "n m"]) -> Float64[Tensor, "n m"]:
    """Return ranks less their mean, zeros of a row that is constant; NaN for a row with NaN."""
    values = values.contiguous()
    ordered = values.sort(dim=1).values
    below = torch.searchsorted(ordered, values)
    not_above = torch.searchsorted(ordered, values, right=True)
    ranks = (below + not_above - values.shape[1]).double() / 2
    return ranks.masked_fill(values.isnan().any(dim=1, keepdim=True), torch.nan)
