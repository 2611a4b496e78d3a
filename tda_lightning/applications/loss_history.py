r"""Loss history: the loss of every visit of a run, in the order of the training.

The recorder takes it from the loss function of the training, with the margin of the label: its
logit minus the highest other logit. Both are those before the step.

Runs of earlier versions hold neither. Their losses are derived from the curvature, :math:`c = p /
(1 - p)` for a cross-entropy with label probability :math:`p`, and :math:`1 / (2 r^2)` for a squared
error with residual :math:`r`, so

.. math:: \ell = \log \frac{1 + c}{c} \qquad \text{or} \qquad \ell = r^2 = \frac{1}{2 c}

Forgetting: Toneva et al. (2019), "An Empirical Study of Example Forgetting". Confidence,
variability and correctness: Swayamdipta et al. (2020), "Dataset Cartography".
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from math import log

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tda_lightning.attribution.attributor import provenance_of
from tda_lightning.results.html_tables import ShownInNotebooks
from tda_lightning.results.optional import DataFrame, import_pandas
from tda_lightning.results.sample_scores import SampleScores
from tda_lightning.stores import Store
from tda_lightning.stores.opening import Run, open_run
from tda_lightning.stores.step import StepFacts

# Below it, the probability of a label is rounding.
_LEAST_PROBABILITY = 1e-7
ROUNDING = 1e-3


@dataclass(frozen=True)
class LossHistory(ShownInNotebooks):
    """The loss of every visit, ordered by sample and, for each sample, by time.

    Attributes:
        sample_ids: Sample of each visit, shape ``(n_visits,)``.
        steps: Index of the step of each visit, shape ``(n_visits,)``.
        epochs: Epoch of each visit, shape ``(n_visits,)``.
        losses: Loss of each visit, before the step, shape ``(n_visits,)``. It is the mean of its
            terms, such as tokens; NaN if the model had diverged, or no term had a weight.
        margins: Logit of the label minus the highest other logit, shape ``(n_visits,)``, if the
            loss is a cross-entropy with one term per sample. It is positive if the label was
            predicted.
        train_ids: Ids of the training set, shape ``(n_train,)``.
        loss: Name of the loss.
        provenance: The recorded run.
    """

    sample_ids: Int[Tensor, " n_visits"]
    steps: Int[Tensor, " n_visits"]
    epochs: Int[Tensor, " n_visits"]
    losses: Float[Tensor, " n_visits"]
    margins: Float[Tensor, " n_visits"] | None
    train_ids: Int[Tensor, " n_train"]
    loss: str
    provenance: Mapping[str, str] = field(default_factory=dict)

    def max_visits(self) -> int:
        """Return the largest number of visits of a sample."""
        return int(self._number_of_visit().max()) + 1 if len(self.sample_ids) else 0

    def first(self, visits: int) -> LossHistory:
        """Return the history of the first ``visits`` visits of each sample."""
        return self._part(self._number_of_visit() < visits)

    def mean(self) -> SampleScores:
        """Return each sample's mean loss over its visits: high for hard and mislabelled samples.

        Samples without a known loss are NaN, and last in a ranking by :meth:`hardest`.
        """
        return self._scores(self._mean(self.losses), "mean loss over visits")

    def last(self) -> SampleScores:
        """Return each sample's loss at its last visit; NaN for samples without a visit."""
        values = self.losses.new_full((len(self.train_ids),), torch.nan)
        values[self._rows()[self._is_last()]] = self.losses[self._is_last()]
        return self._scores(values, "loss at the last visit")

    def forgetting(self) -> SampleScores:
        """Return how often each sample was forgotten: predicted at a visit, and not at the next.

        Visits without a margin do not count, such as those of samples that a step drops.

        Raises:
            ValueError: If the run holds no margins.
        """
        known = self._part(~self._margins().isnan())
        is_learned = known._margins() > 0
        is_forgotten = torch.zeros(len(is_learned), dtype=torch.bool)
        same = known.sample_ids[1:] == known.sample_ids[:-1]
        is_forgotten[1:] = same & is_learned[:-1] & ~is_learned[1:]
        counts = self.losses.new_zeros(len(self.train_ids))
        counts.index_add_(0, known._rows(), is_forgotten.to(counts))
        return self._scores(counts, "forgetting events")

    def correctness(self) -> SampleScores:
        """Return the share of each sample's visits at which its label was predicted.

        Samples that stay hard have a low share. Visits without a margin do not count, such as those
        of samples that a step drops. Samples without another visit are NaN.

        Raises:
            ValueError: If the run holds no margins.
        """
        margins = self._margins()
        is_right = (margins > 0).to(self.losses).masked_fill(margins.isnan(), torch.nan)
        return self._scores(self._mean(is_right), "correctness")

    def learned(self) -> Bool[Tensor, " n_train"]:
        """Return which samples had their label predicted at the last visit with a known loss.

        Without margins, it is that a loss was below log 2: a probability of the label of one half.
        """
        known = self._part(~self.losses.isnan())
        is_learned = known.losses < log(2) if known.margins is None else known.margins > 0
        result = torch.zeros(len(self.train_ids), dtype=torch.bool)
        result[known._rows()[known._is_last()]] = is_learned[known._is_last()]
        return result

    def confidence(self) -> SampleScores:
        """Return the mean probability of each sample's label over its visits.

        If a sample's loss averages several terms, it is the mean of their geometric means.

        Raises:
            ValueError: If the loss is not a cross-entropy.
        """
        return self._scores(self._mean(self._probabilities()), "confidence")

    def variability(self) -> SampleScores:
        """Return the standard deviation of the probability of each sample's label over its visits.

        Raises:
            ValueError: If the loss is not a cross-entropy.
        """
        p = self._probabilities()
        deviations = p - self._mean(p)[self._rows()]
        return self._scores(self._mean(deviations.square()).sqrt(), "variability")

    def _probabilities(self) -> Float[Tensor, " n_visits"]:
        if self.loss != "cross-entropy":
            raise ValueError(
                f"The loss of the run is {self.loss}; expected a cross-entropy, which has label "
                "probabilities. Use `.mean()`."
            )
        return (-self.losses).exp()

    def _margins(self) -> Float[Tensor, " n_visits"]:
        if self.margins is None:
            raise ValueError(
                f"The run holds no margins: its loss is {self.loss}; expected a cross-entropy of "
                "one label per sample, recorded with this version. Use `.mean()`."
            )
        return self.margins

    def hardest(self, k: int = 10) -> Int[Tensor, " k"]:
        """Return the ids of the ``k`` samples with the highest mean loss, highest first.

        ``hardest(len(history.train_ids))`` sorts the data by loss.
        """
        means = self.mean()
        values = means.values.nan_to_num(nan=-torch.inf)
        return SampleScores(values, means.train_ids, means.method).highest(k).ids

    def to_pandas(self) -> DataFrame:
        """Return a data frame with one row per visit."""
        pd = import_pandas()
        columns = {"sample": self.sample_ids, "step": self.steps, "epoch": self.epochs}
        frame = pd.DataFrame({name: values.numpy() for name, values in columns.items()})
        frame = frame.assign(loss=self.losses.numpy())
        return frame if self.margins is None else frame.assign(margin=self.margins.numpy())

    def __repr__(self) -> str:
        n_visited, n_unknown = len(torch.unique(self.sample_ids)), int(self.losses.isnan().sum())
        hardest = ", ".join(map(str, self.hardest(min(5, n_visited)).tolist()))
        head = f"LossHistory of {len(self.losses):,} visits of {n_visited:,} samples ({self.loss})"
        lines = [head, f"  hardest: {hardest}"]
        if n_unknown:
            lines.append(
                f"  {n_unknown:,} visits have no loss: it was not finite, or without weight"
            )
        return "\n".join(lines)

    def _part(self, mask: Bool[Tensor, " n_visits"]) -> LossHistory:
        """Return the history of some visits."""
        return replace(
            self,
            sample_ids=self.sample_ids[mask],
            steps=self.steps[mask],
            epochs=self.epochs[mask],
            losses=self.losses[mask],
            margins=None if self.margins is None else self.margins[mask],
        )

    def _rows(self) -> Int[Tensor, " n_visits"]:
        return torch.searchsorted(self.train_ids, self.sample_ids)

    def _number_of_visit(self) -> Int[Tensor, " n_visits"]:
        """Return how many visits of the same sample come before each visit."""
        starts = torch.searchsorted(self.sample_ids, self.sample_ids)
        return torch.arange(len(self.sample_ids)) - starts

    def _is_last(self) -> Tensor:
        is_last = torch.ones(len(self.sample_ids), dtype=torch.bool)
        is_last[:-1] = self.sample_ids[1:] != self.sample_ids[:-1]
        return is_last

    def _mean(self, values: Float[Tensor, " n_visits"]) -> Float[Tensor, " n_train"]:
        is_known = ~values.isnan()
        parts = torch.stack([values, torch.ones_like(values)], dim=1)[is_known]
        sums = values.new_zeros(len(self.train_ids), 2)
        sums.index_add_(0, self._rows()[is_known], parts)
        return sums[:, 0] / sums[:, 1]

    def _scores(self, values: Float[Tensor, " n_train"], method: str) -> SampleScores:
        return SampleScores(values, self.train_ids, method, self.provenance)


def loss_history(run: Run) -> LossHistory:
    """Return the loss of every recorded visit.

    Args:
        run: A recorded training: its folder or a store. A run of
            :class:`~tda_lightning.LossRecorder`, which holds no rows, is enough.

    Raises:
        FileNotFoundError: If there is no run at the path.
        ValueError: If the run is empty, or holds no losses.
    """
    store = open_run(run)
    ids, steps, epochs, losses, margins = [], [], [], [], []
    for facts in store.facts:
        ids.append(facts.sample_ids)
        steps.append(torch.full_like(facts.sample_ids, facts.index))
        epochs.append(torch.full_like(facts.sample_ids, facts.epoch))
        losses.append(visit_losses(facts))
        margins.append(facts.margins)
    sample_ids = torch.cat(ids)
    order = sample_ids.argsort(stable=True)  # Steps are in order already.
    known = [part.double() for part in margins if part is not None]
    return LossHistory(
        sample_ids[order],
        torch.cat(steps)[order],
        torch.cat(epochs)[order],
        torch.cat(losses)[order],
        torch.cat(known)[order] if len(known) == len(margins) else None,
        store.train_ids(),
        store.facts[0].loss,
        provenance_of(store),
    )


def known_losses(run: Store) -> LossHistory | None:
    """Return the loss of every recorded visit, or ``None`` if some are unknown."""
    are_known = all(_reason_without_losses(facts) is None for facts in run.facts)
    return loss_history(run) if are_known else None


def visit_losses(facts: StepFacts) -> Float[Tensor, " n"]:
    """Return the loss of each visit of a step, in double precision, if the step holds them."""
    if (reason := _reason_without_losses(facts)) is not None:
        raise ValueError(
            f"The losses of step {facts.index} are unknown: {reason}; expected a cross-entropy or "
            "a squared error. Use `self_influence(run)`, which needs none."
        )
    if facts.losses is not None:
        return facts.losses.double()
    assert facts.curvature is not None
    curvature = facts.curvature.double()
    if facts.loss == "squared error":
        return 0.5 / curvature.clamp_min(1e-30)
    return -(curvature / (1 + curvature)).clamp_min(_LEAST_PROBABILITY).log()


def _reason_without_losses(facts: StepFacts) -> str | None:
    if not facts.loss or " and " in facts.loss:
        return f"its loss is {facts.loss or 'not recognized'}"
    if facts.losses is not None:
        return None
    if facts.curvature is None or facts.loss not in ("cross-entropy", "squared error"):
        return "the run holds none, as with CTC, and in runs of earlier versions"
    if facts.terms is not None and bool(((facts.terms - 1).abs() > ROUNDING).any()):
        return "an earlier version recorded no losses of several terms, such as tokens"
    return None
