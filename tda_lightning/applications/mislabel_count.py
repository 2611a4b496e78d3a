r"""Estimate how many labels are wrong, from the losses of a training.

Let :math:`\ell_e` be a sample's mean loss over its first :math:`e` visits. Otsu's threshold splits
:math:`\ell_e^{3/4}` into two groups; its separation is the share of the variance between them (Otsu
1979, "A Threshold Selection Method from Gray-Level Histograms"). The decisive part of the training
is the :math:`e` with the largest separation, from 5, or all of it if that is not clear.

The number of wrong labels is the size of the upper group there. At most those samples count whose
label had less than half of the probability on average, and was not predicted at most visits: others
are hard, such as right labels of two classes that are confused. The power is between a mean, which
misses some, and a square root, which adds hard samples.

Samples that are learned late form an upper group, too. But the model does not contradict them, so
their losses stay below those of the untrained model, which guesses. And until most of the other
samples are learned, it is too early to tell. The number is then unknown.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import log

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from tda_lightning.applications.loss_history import ROUNDING, LossHistory, known_losses
from tda_lightning.applications.notes import Note
from tda_lightning.stores import Store

LEAST_SEPARATION = 0.68
_POWER = 0.75
# The losses of very few visits fall into two groups by chance.
_LEAST_VISITS = 5
# Few samples fall into two groups by chance.
FEW = 50
# So do the losses of one or two visits, which differ by when they came.
_CLEAR_VISITS = 3
# Share of the samples that are not flagged which the model must have learned.
_LEAST_LEARNED = 0.75
# Ends of the decisive part that are tried, at most.
_MAX_ENDS = 40


@dataclass(frozen=True)
class Count:
    """How many labels are wrong.

    Attributes:
        number: The estimate.
        separation: Share of the variance of the suspicions between two groups.
        decisive_visits: Number of first visits of each sample that count.
        visits: Number of visits of each sample, at most.
        doubt: Why two groups, if there are any, may not be wrong and right labels, in a sentence.
    """

    number: int
    separation: float
    decisive_visits: int
    visits: int
    doubt: str = ""

    @property
    def is_clear(self) -> bool:
        """Whether the suspicions fall into a group of wrong labels and one of right labels."""
        return self.separation >= LEAST_SEPARATION and not self.doubt


def decisive_part(history: LossHistory) -> LossHistory:
    """Return the first visits of all samples, up to the best separation of their mean losses.

    All visits are returned if no separation is clear.
    """
    n_visits = history.max_visits()
    ends = torch.linspace(min(_LEAST_VISITS, n_visits), n_visits, _MAX_ENDS).round().long()
    parts = [history.first(end) for end in sorted(set(ends.tolist()))]
    # A loss that is not finite separates nothing.
    means = [part.mean().values.nan_to_num(nan=0.0, posinf=0.0) for part in parts]
    separations = [best_split(mean.clamp_min(0).pow(_POWER))[1] for mean in means]
    best = max(range(len(parts)), key=lambda at: (separations[at], at))
    return parts[best] if separations[best] >= LEAST_SEPARATION else history


def estimate_number(
    suspicion: Float[Tensor, " n_train"],
    history: LossHistory | None,
    decisive: LossHistory | None,
) -> Count:
    """Estimate the number of wrong labels from the suspicion of each sample.

    ``history`` holds the losses of all visits, if they are known; ``decisive`` holds those that the
    suspicions are the means of.
    """
    number, separation = best_split(suspicion.clamp_min(0).pow(_POWER))
    if history is None or decisive is None:
        return Count(number, separation, 0, 0)
    if history.loss == "cross-entropy":
        number = min(number, int((decisive.confidence().values < 0.5).sum()))
        if decisive.margins is not None:
            number = min(number, int((decisive.correctness().values < 0.5).sum()))
    doubt = _doubt(suspicion, number, history, decisive)
    count = Count(number, separation, decisive.max_visits(), history.max_visits(), doubt)
    if count.is_clear or history.loss != "cross-entropy":
        return count
    # Of two groups there is no sign.
    return replace(count, number=min(number, int((history.last().values > log(2)).sum())))


def _doubt(
    suspicion: Float[Tensor, " n_train"], number: int, history: LossHistory, decisive: LossHistory
) -> str:
    """Return why the most suspicious samples may be learned late instead of wrong, or nothing."""
    if history.max_visits() < _CLEAR_VISITS:
        return (
            f"No sample came {_CLEAR_VISITS} times: losses of fewer visits are high for samples "
            "that came early."
        )
    order = suspicion.argsort(descending=True)
    flagged = float(suspicion[order[:number]].mean())
    untrained = float(history.losses[history.steps.argsort(stable=True)[:FEW]].nanmean())
    if number and flagged < untrained:
        return (
            f"The mean loss of the flagged samples, {flagged:.3g}, is below that of the first "
            f"batches, {untrained:.3g}: they are learned late, but not contradicted."
        )
    others = order[number:][suspicion[order[number:]].isfinite()]
    learned = float(decisive.learned()[others].double().mean())
    if learned < _LEAST_LEARNED:
        return f"The model has learned only {learned:.0%} of the other samples."
    return ""


def can_count(run: Store, history: LossHistory | None) -> bool:
    """Return whether the estimated number was tested for such data."""
    is_tested = history is not None and history.loss == "cross-entropy"
    return is_tested and not has_several_terms(run) and len(run.train_ids()) >= FEW


def has_several_terms(run: Store) -> bool:
    """Return whether the loss of a sample is the mean of several terms, such as tokens."""
    terms = [facts.terms for facts in run.facts if facts.terms is not None]
    return any(bool((part > 1 + ROUNDING).any()) for part in terms)


def _suspicious_ids(run: Store) -> Int64[Tensor, " n"]:
    """Return the samples whose labels are likely wrong; none unless they are a clear group."""
    history = known_losses(run)
    if history is None or not can_count(run, history):
        return torch.empty(0, dtype=torch.int64)
    decisive = decisive_part(history)
    suspicion = decisive.mean().values.nan_to_num(nan=-torch.inf)
    count = estimate_number(suspicion, history, decisive)
    number = count.number if count.is_clear else 0
    return history.train_ids[suspicion.topk(number).indices]


def notes_on_selected(run: Store, ids: Int64[Tensor, " n"]) -> tuple[Note, ...]:
    """Return a note if samples with suspicious labels were selected."""
    suspicious = _suspicious_ids(run)
    number = int(torch.isin(suspicious, ids).sum())
    if not number:
        return ()
    return (
        Note(
            f"About {len(suspicious):,} labels of the data look wrong, and {number:,} of these "
            "samples are selected.",
            remedy="Check them first: see `find_mislabeled`.",
        ),
    )


def best_split(values: Float[Tensor, " n"]) -> tuple[int, float]:
    """Split values into two groups with the largest share of the variance between them (Otsu).

    Returns:
        The size of the upper group, and that share, from 0 to 1. No values are in the upper group
        if all are equal.

    >>> import torch
    >>> best_split(torch.tensor([0.0, 0.0, 1.0, 0.0]))
    (1, 1.0)
    """
    ordered, n = values.double().sort(descending=True).values, len(values)
    variance = float(ordered.var(unbiased=False)) if n > 1 else 0.0
    if variance < 1e-30:
        return 0, 0.0
    above = torch.arange(1, n, dtype=torch.float64)
    sums = ordered.cumsum(0)
    gap = sums[:-1] / above - (sums[-1] - sums[:-1]) / (n - above)
    between = above * (n - above) / n**2 * gap.square()
    best = int(between.argmax())
    return best + 1, float(between[best]) / variance
