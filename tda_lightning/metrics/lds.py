r"""Do the scores foretell what retraining without some samples does? The linear datamodeling score.

For each query :math:`q`, over subsets :math:`S_1, \dots, S_m` of the training data,

.. math:: \mathrm{LDS}(q) = \rho \Big( \big(-L_q(\theta_{S_j})\big)_{j}, \;
   \big( \textstyle\sum_{i \in S_j} s(q, i) \big)_{j} \Big)

with Spearman's rank correlation :math:`\rho` and the loss :math:`L_q(\theta_{S_j})` of the query
after retraining on :math:`S_j`. Park et al. (2023), "TRAK: Attributing Model Behavior at Scale",
definition 2.3; Ilyas et al. (2022), "Datamodels: Predicting Predictions from Training Data". Losses
stand with a minus because positive scores mark proponents, whose presence lowers the loss.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def linear_datamodeling_score(
    scores: Float[Tensor, "n_query n_train"],
    kept: Bool[Tensor, "n_subsets n_train"],
    losses: Float[Tensor, "n_subsets n_query"],
) -> Float[Tensor, " n_query"]:
    """Return, per query, how well summed scores rank the subsets by the loss after retraining.

    Args:
        scores: Scores, positive for proponents, shape ``(n_query, n_train)``.
        kept: Which samples each retraining used, shape ``(n_subsets, n_train)``.
        losses: Each query's loss after each retraining, shape ``(n_subsets, n_query)``.

    Returns:
        Spearman's correlations, ties at their average rank, in float64, shape ``(n_query,)``;
        not a number where all predictions or all losses are equal.

    >>> kept = torch.tensor([[True, False], [False, True], [True, True]])
    >>> losses = torch.tensor([[0.2], [0.9], [0.1]])
    >>> linear_datamodeling_score(torch.tensor([[2.0, 1.0]]), kept, losses)
    tensor([1.], dtype=torch.float64)
    """
    predictions = scores.double() @ kept.double().mT  # (n_query, n_subsets)
    foretold, true = _centred_ranks(predictions), _centred_ranks(-losses.mT)
    products = (foretold * true).sum(dim=1)
    return products / (foretold.square().sum(dim=1) * true.square().sum(dim=1)).sqrt()


def _centred_ranks(values: Float[Tensor, "n m"]) -> Float[Tensor, "n m"]:
    values = values.contiguous()
    ordered = values.sort(dim=1).values
    below = torch.searchsorted(ordered, values)
    not_above = torch.searchsorted(ordered, values, right=True)
    return (below + not_above - values.shape[1]).double() / 2
