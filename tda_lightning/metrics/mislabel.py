"""Detect mislabelled samples by their scores: precision and recall at the top, and AUC."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tda_lightning.metrics.checks import require_mask, require_rankable
from tda_lightning.results.ranking import require_rank
from tda_lightning.stores.arguments import require_positive


def mislabel_recall(
    values: Float[Tensor, " n_train"], mislabelled: Bool[Tensor, " n_train"], fraction: float = 0.1
) -> float:
    """Return the share of mislabelled samples that are among the highest scores.

    Samples that tie at the cutoff are inspected in random order; the expected share is returned.

    Args:
        values: One score per sample; higher is more suspicious, shape ``(n_train,)``.
        mislabelled: Whether each sample has a wrong label, shape ``(n_train,)``.
        fraction: Share of all samples to inspect, above 0 and up to 1.

    Raises:
        ValueError: If no sample is mislabelled, no sample would be inspected, or a value is NaN.

    >>> import torch
    >>> wrong = torch.tensor([True, True, False, False])
    >>> mislabel_recall(torch.tensor([9.0, 1.0, 8.0, 2.0]), wrong, fraction=0.5)
    0.5
    """
    _require(values, mislabelled)
    require_positive("fraction", fraction)
    k = round(fraction * len(values))
    if not 1 <= k <= len(values):
        raise ValueError(
            f"`fraction` is {fraction}, which is {k} of {len(values)} samples; expected from 1 to "
            "all samples."
        )
    cutoff = values.topk(k).values[-1]
    above, tied = values > cutoff, values == cutoff
    inspected_share = (k - above.sum()) / tied.sum()
    n_detected = mislabelled[above].sum() + inspected_share * mislabelled[tied].sum()
    return float(n_detected / mislabelled.sum())


def mislabel_precision(
    values: Float[Tensor, " n_train"], mislabelled: Bool[Tensor, " n_train"], k: int
) -> float:
    """Return the share of mislabelled samples among the ``k`` highest scores.

    Samples that tie at the cutoff are inspected in random order; the expected share is returned.

    Args:
        values: One score per sample; higher is more suspicious, shape ``(n_train,)``.
        mislabelled: Whether each sample has a wrong label, shape ``(n_train,)``.
        k: Number of samples to inspect.

    Raises:
        ValueError: If no sample is mislabelled, ``k`` is out of range, or a value is NaN.

    >>> import torch
    >>> wrong = torch.tensor([True, True, False, False])
    >>> mislabel_precision(torch.tensor([9.0, 1.0, 8.0, 2.0]), wrong, k=2)
    0.5
    """
    require_rank(k, len(values))
    recall = mislabel_recall(values, mislabelled, k / len(values))
    return recall * float(mislabelled.sum()) / k


def mislabel_auc(values: Float[Tensor, " n_train"], mislabelled: Bool[Tensor, " n_train"]) -> float:
    """Return the probability that a mislabelled sample scores above a correct one.

    A tie counts as one half.

    Args:
        values: One score per sample; higher is more suspicious, shape ``(n_train,)``.
        mislabelled: Whether each sample has a wrong label, shape ``(n_train,)``.

    Raises:
        ValueError: If no sample is mislabelled, all samples are, or a value is NaN.

    >>> import torch
    >>> wrong = torch.tensor([True, True, False, False])
    >>> mislabel_auc(torch.tensor([9.0, 1.0, 8.0, 2.0]), wrong)
    0.5
    """
    _require(values, mislabelled)
    if mislabelled.all():
        raise ValueError("`mislabelled` is true for all samples; expected some correct samples.")
    wrong, right = values[mislabelled].sort().values, values[~mislabelled].sort().values
    below = torch.searchsorted(right, wrong).sum()
    not_above = torch.searchsorted(right, wrong, right=True).sum()
    return float((below + not_above) / 2 / (len(wrong) * len(right)))


def _require(values: Tensor, mislabelled: Tensor) -> None:
    require_rankable("values", values, 1, "self_influence(run).values")
    require_mask("mislabelled", mislabelled, (len(values),))
    if not mislabelled.any():
        raise ValueError("`mislabelled` is false for all samples; expected some true ones.")
