"""Do the scores find mislabelled samples? Recall at the top, and area under the ROC curve."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tda_lightning.arguments import require_positive
from tda_lightning.metrics.checks import require_mask, require_numbers


def mislabel_recall(
    values: Float[Tensor, " n_train"], mislabelled: Bool[Tensor, " n_train"], fraction: float = 0.1
) -> float:
    """Return the share of mislabelled samples that stand among the highest scores.

    Of samples that tie at the border, which one would look at is left to chance: they count by the
    share of them that there is room for.

    Args:
        values: One score per sample; higher is more suspicious, shape ``(n_train,)``.
        mislabelled: Which samples carry a wrong label, shape ``(n_train,)``.
        fraction: Share of all samples that one would look at, above 0 and up to 1.

    Raises:
        ValueError: If nothing is mislabelled, nothing would be looked at, or a value is NaN.

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
            f"`fraction` is {fraction}, of {len(values)} samples {k}; expected from 1 to all."
        )
    border = values.topk(k).values[-1]
    above, tied = values > border, values == border
    share = (k - above.sum()) / tied.sum()
    found = mislabelled[above].sum() + share * mislabelled[tied].sum()
    return float(found / mislabelled.sum())


def mislabel_auc(values: Float[Tensor, " n_train"], mislabelled: Bool[Tensor, " n_train"]) -> float:
    """Return the chance that a mislabelled sample scores above a correct one (ties are half).

    Args:
        values: One score per sample; higher is more suspicious, shape ``(n_train,)``.
        mislabelled: Which samples carry a wrong label, shape ``(n_train,)``.

    Raises:
        ValueError: If no sample is mislabelled, or all are, or a value is NaN.

    >>> import torch
    >>> wrong = torch.tensor([True, True, False, False])
    >>> mislabel_auc(torch.tensor([9.0, 1.0, 8.0, 2.0]), wrong)
    0.5
    """
    _require(values, mislabelled)
    if mislabelled.all():
        raise ValueError("All of `mislabelled` is true; expected some samples that are right.")
    wrong, right = values[mislabelled].sort().values, values[~mislabelled].sort().values
    below = torch.searchsorted(right, wrong).sum()
    not_above = torch.searchsorted(right, wrong, right=True).sum()
    return float((below + not_above) / 2 / (len(wrong) * len(right)))


def _require(values: Tensor, mislabelled: Tensor) -> None:
    require_numbers("values", values, 1, "self_influence(run).values")
    require_mask("mislabelled", mislabelled, (len(values),))
    if not mislabelled.any():
        raise ValueError("None of `mislabelled` is true; expected some mislabelled samples.")
    if values.isnan().any():
        raise ValueError(
            f"`values` of {int(values.isnan().sum())} samples are NaN; expected numbers, which can "
            "be ranked."
        )
