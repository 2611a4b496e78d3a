"""Suspicious labels, and training samples that stand apart."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from tda_lightning.applications import Mislabeled
from tda_lightning.report.evidence.gathering import Evidence
from tda_lightning.report.findings.finding import MAX_SHOWN, Finding

# A second peak must rise above the valley before it by this factor, and hold at most this share.
_RISE, _LARGEST_SHARE = 1.5, 0.4
_BINS = 40
_MEANING = (
    "Such samples fit badly with the others, so the model had to learn them one by one. A wrong "
    "label is the commonest reason; a rare but correct sample is another. Check them from the "
    "first on, and stop after a stretch of correct ones."
)


def number_set_apart(values: Float[Tensor, " n_train"]) -> int:
    """Return how many self-influences are set apart from the rest, on a logarithmic axis.

    These are the values above Tukey's outer fence, or those of a second peak of the smoothed
    histogram, if there is one. The fence is the upper quartile plus three times the distance of the
    quartiles.
    """
    positive = values[values > 0].double()
    if len(positive) < 2:
        return 0
    logs = positive.log()
    low, high = logs.quantile(0.25), logs.quantile(0.75)
    return max(int((logs > high + 3 * (high - low)).sum()), _in_second_peak(logs))


def _in_second_peak(logs: Float[Tensor, " n"]) -> int:
    low, high = float(logs.min()), float(logs.max())
    if high <= low:
        return 0
    counts = torch.histc(logs, _BINS, low, high)
    kernel = torch.tensor([1.0, 2, 3, 4, 3, 2, 1], dtype=logs.dtype)
    smooth = torch.nn.functional.conv1d(counts[None, None], kernel[None, None] / 16, padding=3)[
        0, 0
    ]
    rises = [
        float(min(smooth[:valley].max(), smooth[valley + 1 :].max()) / (smooth[valley] + 1))
        for valley in range(1, _BINS - 1)
    ]
    valley = max(range(len(rises)), key=rises.__getitem__) + 1
    above = int((logs > low + (valley + 0.5) * (high - low) / _BINS).sum())
    is_apart = rises[valley - 1] >= _RISE and above <= _LARGEST_SHARE * len(logs)
    return above if is_apart else 0


def _number_of_suspects(suspects: Mislabeled) -> tuple[str, str]:
    n_train = len(suspects.train_ids)
    how = "The model found them hard to learn: their losses stayed high for long."
    if suspects.is_clear:
        number = f"{suspects.estimated_number:,} of {n_train:,}"
        return f"About {number} training labels are probably wrong.", how
    first = f"{suspects.flagged_number:,} of {n_train:,} training labels are suspicious."
    return first, f"{how} They form no clear group, so their number is a guess."


def suspicious_labels(evidence: Evidence) -> Finding:
    """Estimate how many labels are wrong, or show the most unusual samples."""
    n_train = len(evidence.influence.values)
    n_apart = number_set_apart(evidence.influence.values)
    suspects = evidence.suspects
    if suspects is not None and suspects.flagged_number:
        worst = tuple(suspects.ids[:MAX_SHOWN].tolist())
        if suspects.is_clear or n_apart:
            sentences = (*_number_of_suspects(suspects), _MEANING)
            return Finding("Suspicious labels", sentences, "attention", worst)
        first = (
            f"No group of labels stands apart from the rest of {n_train:,}, so the number of wrong "
            "ones is unknown. The most suspicious labels are shown."
        )
        return Finding("Possibly wrong labels", (first, _MEANING), "unknown", worst)
    highest = tuple(evidence.influence.highest(min(MAX_SHOWN, n_train)).ids.tolist())
    if n_apart:
        first = f"{n_apart:,} of {n_train:,} training samples stand apart from the rest."
        how = "Their own effect on the model is far larger than that of the others."
        return Finding("Suspicious training samples", (first, how, _MEANING), "attention", highest)
    first = (
        "No group of training samples stands apart from the rest. Single mistakes may still be "
        "among the most unusual samples, shown here."
    )
    return Finding("Unusual training samples", (first, _MEANING), "fine", highest)
