r"""Counterfactuals: what happens to a query if its proponents are removed and the model retrained?

:func:`kept_without_proponents` gives the subsets to retrain on; the metrics compare the results.
Leave-one-out correlation: Koh & Liang (2017), sec. 4.1, here of ranks. Removal curve: Park et al.
(2023), "TRAK", sec. 5. Brittleness: Ilyas et al. (2022), "Datamodels", sec. 4.1.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Float64, Int
from torch import Tensor

from tda_lightning.metrics.agreement import rank_correlation
from tda_lightning.metrics.checks import describe, require_numbers, require_rankable
from tda_lightning.results.ranking import require_rank


def kept_without_proponents(
    scores: Float[Tensor, " n_train"], sizes: Sequence[int]
) -> Bool[Tensor, "n_sizes n_train"]:
    """Return the samples that remain without the highest scores, for each number to remove.

    Args:
        scores: Scores of one query, or of a group of queries, shape ``(n_train,)``.
        sizes: Numbers of proponents to remove.

    Returns:
        Masks of the remaining samples, shape ``(n_sizes, n_train)``.

    Raises:
        ValueError: If an argument has another type or shape.

    >>> import torch
    >>> kept_without_proponents(torch.tensor([1.0, 9.0, 5.0]), sizes=[1, 2])
    tensor([[ True, False,  True],
            [ True, False, False]])
    """
    require_rankable("scores", scores, 1, "attribute(...).values[0]")
    order = scores.argsort(descending=True)
    kept = torch.ones(len(sizes), len(scores), dtype=torch.bool)
    for mask, size in zip(kept, sizes, strict=True):
        mask[order[: require_rank(size, len(scores))]] = False
    return kept


def leave_one_out_correlation(
    scores: Float[Tensor, "n_query n_removed"],
    losses: Float[Tensor, "n_removed n_query"],
    full_losses: Float[Tensor, " n_query"],
) -> Float64[Tensor, " n_query"]:
    """Correlate scores with the changes in loss after retraining without single samples.

    Args:
        scores: Scores of the removed samples, positive for proponents, shape
            ``(n_query, n_removed)``.
        losses: Losses after retraining without each of these samples, shape
            ``(n_removed, n_query)``.
        full_losses: Losses after training on all samples, shape ``(n_query,)``.

    Returns:
        Spearman's correlations, shape ``(n_query,)``. NaN where all scores or changes are equal.

    Raises:
        ValueError: If an argument has another type or shape.

    >>> import torch
    >>> scores, losses = torch.tensor([[2.0, 1.0, -1.0]]), torch.tensor([[0.9], [0.6], [0.4]])
    >>> leave_one_out_correlation(scores, losses, full_losses=torch.tensor([0.5]))
    tensor([1.], dtype=torch.float64)
    """
    require_numbers("scores", scores, 2, "attribute(...).values[:, removed]")
    require_numbers("losses", losses, 2, "torch.stack(losses_of_each_retraining)")
    require_numbers("full_losses", full_losses, 1, "losses_of_the_full_training")
    if losses.shape != scores.mT.shape or len(full_losses) != len(scores):
        raise ValueError(
            f"`losses` is {describe(losses)} and `full_losses` {describe(full_losses)}; expected "
            f"the shapes {tuple(scores.mT.shape)} and ({len(scores)},) for `scores` of shape "
            f"{tuple(scores.shape)}."
        )
    return rank_correlation(scores.double(), (losses.double() - full_losses.double()).mT)


def removal_curve(
    losses: Float[Tensor, "n_sizes n_query"], full_losses: Float[Tensor, " n_query"]
) -> Float64[Tensor, " n_sizes"]:
    """Return the mean rise in loss for each number of removed proponents.

    Compare it with the curve of random subsets: an attribution is better if its curve is higher.

    Args:
        losses: Losses after retraining without the proponents, one row per number removed.
        full_losses: Losses after training on all samples.

    Raises:
        ValueError: If an argument has another type or shape.

    >>> import torch
    >>> removal_curve(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([1.0, 1.0]))
    tensor([0.5000, 2.5000], dtype=torch.float64)
    """
    require_numbers("losses", losses, 2, "torch.stack(losses_of_each_size)")
    require_numbers("full_losses", full_losses, 1, "losses_of_the_full_training")
    if losses.shape[1:] != full_losses.shape:
        raise ValueError(
            f"`losses` is {describe(losses)} and `full_losses` {describe(full_losses)}; expected "
            "the shapes (n_sizes, n_query) and (n_query,)."
        )
    return (losses.double() - full_losses.double()).mean(dim=1)


def brittleness(
    predictions: Int[Tensor, "n_sizes n_query"], full_predictions: Int[Tensor, " n_query"]
) -> Float64[Tensor, " n_sizes"]:
    """Return the share of predictions that flip at each number of removed proponents, or earlier.

    Args:
        predictions: Predictions after retraining without the proponents; rows in increasing order
            of the number removed, shape ``(n_sizes, n_query)``.
        full_predictions: Predictions after training on all samples, shape ``(n_query,)``.

    Raises:
        ValueError: If the numbers of queries differ.

    >>> import torch
    >>> brittleness(torch.tensor([[1, 0], [0, 1]]), full_predictions=torch.tensor([0, 0]))
    tensor([0.5000, 1.0000], dtype=torch.float64)
    """
    if predictions.ndim != 2 or predictions.shape[1:] != full_predictions.shape:
        raise ValueError(
            f"`predictions` is {describe(predictions)} and `full_predictions` "
            f"{describe(full_predictions)}; expected the shapes (n_sizes, n_query) and (n_query,)."
        )
    has_flipped = (predictions != full_predictions).cummax(dim=0).values
    return has_flipped.double().mean(dim=1)
