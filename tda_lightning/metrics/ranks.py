"""Spearman's rank correlation, row by row."""

from __future__ import annotations

import torch
from jaxtyping import Float, Float64
from torch import Tensor


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
