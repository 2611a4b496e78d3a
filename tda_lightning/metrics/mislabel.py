"""Do the scores find mislabelled samples? Recall at the top, and area under the ROC curve."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def mislabel_recall(
    values: Float[Tensor, " n_train"], mislabelled: Bool[Tensor, " n_train"], fraction: float = 0.1
) -> float:
    """Return the share of mislabelled samples that stand among the highest scores.

    Args:
        values: One score per sample; higher is more suspicious, shape ``(n_train,)``.
        mislabelled: Which samples carry a wrong label, shape ``(n_train,)``.
        fraction: Share of all samples that one would look at.

    >>> wrong = torch.tensor([True, True, False, False])
    >>> mislabel_recall(torch.tensor([9.0, 1.0, 8.0, 2.0]), wrong, fraction=0.5)
    0.5
    """
    looked_at = values.topk(round(fraction * len(values))).indices
    return float(mislabelled[looked_at].sum() / mislabelled.sum())


def mislabel_auc(values: Float[Tensor, " n_train"], mislabelled: Bool[Tensor, " n_train"]) -> float:
    """Return the chance that a mislabelled sample scores above a correct one (ties are half).

    Args:
        values: One score per sample; higher is more suspicious, shape ``(n_train,)``.
        mislabelled: Which samples carry a wrong label, shape ``(n_train,)``.

    >>> wrong = torch.tensor([True, True, False, False])
    >>> mislabel_auc(torch.tensor([9.0, 1.0, 8.0, 2.0]), wrong)
    0.5
    """
    wrong, right = values[mislabelled].sort().values, values[~mislabelled].sort().values
    below = torch.searchsorted(right, wrong).sum()
    not_above = torch.searchsorted(right, wrong, right=True).sum()
    return float((below + not_above) / 2 / (len(wrong) * len(right)))
