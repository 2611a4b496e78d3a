r"""Linear datamodeling score: do scores predict the losses after retraining without some samples?

For each query :math:`q`, over subsets :math:`S_1, \dots, S_m` of the training data,

.. math:: \mathrm{LDS}(q) = \rho \Big( \big(-L_q(\theta_{S_j})\big)_{j}, \;
   \big( \textstyle\sum_{i \in S_j} s(q, i) \big)_{j} \Big)

with Spearman's rank correlation :math:`\rho` and the loss :math:`L_q(\theta_{S_j})` of the query
after retraining on :math:`S_j`. Park et al. (2023), "TRAK: Attributing Model Behavior at Scale",
definition 2.3; Ilyas et al. (2022), "Datamodels: Predicting Predictions from Training Data". Losses
enter with a minus sign because positive scores mark proponents, whose presence lowers the loss.
"""

from __future__ import annotations

from jaxtyping import Bool, Float, Float64
from torch import Tensor

from tda_lightning.metrics.checks import require_mask, require_numbers
from tda_lightning.metrics.ranks import rank_correlation


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
