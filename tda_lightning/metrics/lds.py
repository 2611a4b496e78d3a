r"""Linear datamodeling score: do scores predict the losses after retraining without some samples?

For each query :math:`q`, over subsets :math:`S_1, \ldots, S_m` of the training data,

.. math:: \mathrm{LDS}(q) = \rho \big( \big(-L_q(\theta_{S_j})\big)_{j}, \;
   \big( \textstyle\sum_{i \in S_j} s(q, i) \big)_{j} \big)

with Spearman's rank correlation :math:`\rho` and the loss :math:`L_q(\theta_{S_j})` of the query
after retraining on :math:`S_j`. Park et al. (2023), "TRAK: Attributing Model Behavior at Scale",
definition 2.3; Ilyas et al. (2022), "Datamodels: Predicting Predictions from Training Data". Losses
enter with a minus sign because positive scores mark proponents, whose presence lowers the loss.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Float64
from torch import Tensor

from tda_lightning.metrics.agreement import rank_correlation
from tda_lightning.metrics.checks import require_mask, require_numbers
from tda_lightning.stores.arguments import require_whole


def linear_datamodeling_score(
    scores: Float[Tensor, "n_query n_train"],
    kept: Bool[Tensor, "n_subsets n_train"],
    losses: Float[Tensor, "n_subsets n_query"],
) -> Float64[Tensor, " n_query"]:
    """Correlate each query's summed scores with its losses, over retrainings on subsets.

    Args:
        scores: Scores, positive for proponents, shape ``(n_query, n_train)``.
        kept: Which samples each retraining used, shape ``(n_subsets, n_train)``.
        losses: Each query's loss after each retraining, shape ``(n_subsets, n_query)``.

    Returns:
        Spearman's correlations, shape ``(n_query,)``. Ties share their average rank. NaN where all
        predictions or all losses are equal, or one is NaN.

    Raises:
        ValueError: If an argument has another type or shape.

    >>> import torch
    >>> kept = torch.tensor([[True, False], [False, True], [True, True]])
    >>> losses = torch.tensor([[0.2], [0.9], [0.1]])
    >>> linear_datamodeling_score(torch.tensor([[2.0, 1.0]]), kept, losses)
    tensor([1.], dtype=torch.float64)
    """
    require_numbers("scores", scores, 2, "attribute(...).values")
    require_numbers("losses", losses, 2, "torch.stack(losses_of_each_retraining)")
    (n_query, n_train), n_subsets = scores.shape, len(losses)
    require_mask("kept", kept, (n_subsets, n_train))
    if losses.shape != (n_subsets, n_query):
        raise ValueError(
            f"`losses` has the shape {tuple(losses.shape)}; expected ({n_subsets}, {n_query}): a "
            "row for each retraining and a column for each query of `scores`."
        )
    predictions = scores.double() @ kept.double().mT  # (n_query, n_subsets)
    return rank_correlation(predictions, -losses.mT)


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

    Retrainings and queries are both random, so both are resampled: the percentile interval of Efron
    & Tibshirani (1993), "An Introduction to the Bootstrap", ch. 13.

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
