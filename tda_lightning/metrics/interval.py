"""Confidence interval of the linear datamodeling score, by the bootstrap.

Efron & Tibshirani (1993), "An Introduction to the Bootstrap", ch. 13: the percentile interval.
Retrainings and queries are both random, so both are resampled.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tda_lightning.arguments import require_whole
from tda_lightning.metrics.lds import linear_datamodeling_score


@dataclass(frozen=True)
class Estimate:
    """A number with its confidence interval.

    Attributes:
        value: The estimate.
        low: Lower end of the interval.
        high: Upper end of the interval.
        confidence: Probability with which such an interval covers the true value.
    """

    value: float
    low: float
    high: float
    confidence: float

    def __repr__(self) -> str:
        """Show the value and the interval."""
        interval = f"{self.confidence:.0%}: {self.low:.3f} to {self.high:.3f}"
        return f"{self.value:.3f} ({interval})"


def datamodeling_interval(
    scores: Float[Tensor, "n_query n_train"],
    kept: Bool[Tensor, "n_subsets n_train"],
    losses: Float[Tensor, "n_subsets n_query"],
    *,
    confidence: float = 0.95,
    n_resamples: int = 1000,
    seed: int = 0,
) -> Estimate:
    """Return the mean linear datamodeling score over queries, with a confidence interval.

    Args:
        scores: See :func:`~tda_lightning.metrics.linear_datamodeling_score`.
        kept: See there.
        losses: See there.
        confidence: Probability with which the interval covers the true value.
        n_resamples: Number of bootstrap samples.
        seed: Seed of the resampling.

    Returns:
        The estimate. Queries without a score (NaN) are left out.

    Raises:
        ValueError: If an argument has another type or shape.
    """
    require_whole("n_resamples", n_resamples, least=10)
    if not 0 < confidence < 1:
        raise ValueError(f"`confidence` is {confidence!r}; expected a number between 0 and 1.")
    value = linear_datamodeling_score(scores, kept, losses).nanmean()
    chance = torch.Generator().manual_seed(seed)
    (n_subsets, n_query), means = losses.shape, []
    for _ in range(n_resamples):
        subsets = torch.randint(n_subsets, (n_subsets,), generator=chance)
        queries = torch.randint(n_query, (n_query,), generator=chance)
        part = linear_datamodeling_score(
            scores[queries], kept[subsets], losses[subsets][:, queries]
        )
        means.append(part.nanmean())
    tail = (1 - confidence) / 2
    ends = torch.tensor([tail, 1 - tail], dtype=torch.float64)
    low, high = torch.stack(means).quantile(ends).tolist()
    return Estimate(float(value), low, high, confidence)
