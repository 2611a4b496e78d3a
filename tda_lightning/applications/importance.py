r"""Importance scores of training samples, from the recorded visits: higher is harder.

============== ==================================================== =======================
name           mean over the visits of a sample                     source
============== ==================================================== =======================
`GraNd`        norm of the gradient                                 Paul et al. (2021)
`EL2N`         norm of the error :math:`\lVert p - y \rVert`         Paul et al. (2021)
`LabelLoss`    loss, such as :math:`-\log p_y`                      Jiang et al. (2019)
`AUM`          minus the margin :math:`z_y - \max_{j \ne y} z_j`     Pleiss et al. (2020)
`Forgetting`   times that it was no longer predicted (a count)      Toneva et al. (2019)
============== ==================================================== =======================

:math:`z` are the logits before the step, :math:`p` the predicted probabilities, and :math:`y` the
label. The recorder takes these numbers from the loss function of the training, for any number of
classes. Rows are needed for ``GraNd`` only.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import takewhile

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tda_lightning.applications.loss_history import visit_losses
from tda_lightning.attribution import SelfAttributor, TracIn
from tda_lightning.attribution.attributor import Totals, provenance_of
from tda_lightning.results.sample_scores import SampleScores
from tda_lightning.stores import Store
from tda_lightning.stores.arguments import require_kind, require_whole
from tda_lightning.stores.step import Step, StepFacts


class Importance(ABC):
    """A score per training sample, from a run."""

    @abstractmethod
    def scores(self, run: Store) -> SampleScores:
        """Return the importance of each training sample, shape ``(n_train,)``.

        Samples without a visit score zero. Visits whose loss has no weight, as where a step drops
        easy samples, do not count.

        Raises:
            ValueError: If the run does not hold what the score needs.
        """


@dataclass(frozen=True)
class _MeanOverVisits(Importance):
    """The mean of a number over the visits of each sample.

    Attributes:
        epochs: Only the first epochs count; by default, all do. Early scores are cheap to get, and
            Paul et al. use those of the first tenth of a training.
    """

    epochs: int | None = None

    def __post_init__(self) -> None:
        if self.epochs is not None:
            require_whole("epochs", self.epochs, least=1)

    def scores(self, run: Store) -> SampleScores:
        """Average over the visits."""
        totals = Totals(run.train_ids(), 1, torch.empty(0, dtype=run.recipe.torch_dtype))
        for step in takewhile(self._counts, self._steps(run)):
            sample_ids, values = _with_weight(step, self._values(step))
            totals.add_(sample_ids, values[:, None].to(totals.values))
        return _scores(run, totals.means()[:, 0], repr(self))

    def _counts(self, step: StepFacts) -> bool:
        return self.epochs is None or step.epoch < self.epochs

    def _steps(self, run: Store) -> Sequence[StepFacts]:
        """Return the steps to average over, without their rows."""
        return run.facts

    @abstractmethod
    def _values(self, step: StepFacts) -> Float[Tensor, " n"]:
        """Return the number of each visit of a step."""


@dataclass(frozen=True)
class GraNd(_MeanOverVisits):
    """Norm of the gradient of each visit's loss, in the coordinates of the run."""

    def _steps(self, run: Store) -> Sequence[StepFacts]:
        run.recipe.require_rows()
        return run

    def _values(self, step: StepFacts) -> Float[Tensor, " n"]:
        assert isinstance(step, Step)
        norms: Tensor = step.sketch.norm(dim=1)
        return norms / step.weights.clamp_min(1e-30)


@dataclass(frozen=True)
class EL2N(_MeanOverVisits):
    """Norm of the predicted probabilities minus the label."""

    def _values(self, step: StepFacts) -> Float[Tensor, " n"]:
        return _of_one_label(step, step.errors)


@dataclass(frozen=True)
class LabelLoss(_MeanOverVisits):
    """Loss at each visit, before the step. A sample's loss may be the mean of several terms."""

    def _values(self, step: StepFacts) -> Float[Tensor, " n"]:
        return visit_losses(step)


@dataclass(frozen=True)
class AUM(_MeanOverVisits):
    """Minus the area under the margin: samples with a small or negative margin score high."""

    def _values(self, step: StepFacts) -> Float[Tensor, " n"]:
        return -_of_one_label(step, step.margins)


@dataclass(frozen=True)
class Forgetting(Importance):
    """Number of times that a sample was predicted at one visit and no longer at the next.

    Samples that were never predicted score one more than any count.
    """

    def scores(self, run: Store) -> SampleScores:
        """Count over the visits."""
        train_ids = run.train_ids()
        learned = torch.zeros(len(train_ids), dtype=torch.bool)
        ever, visited = learned.clone(), learned.clone()
        events = torch.zeros(len(train_ids), dtype=run.recipe.torch_dtype)
        for step in run.facts:
            sample_ids, margins = _with_weight(step, _of_one_label(step, step.margins))
            at, now = torch.searchsorted(train_ids, sample_ids), margins > 0
            events[at] += (learned[at] & ~now).to(events)
            learned[at], visited[at] = now, True
            ever[at] |= now
        most = float(events.max()) if len(events) else 0.0
        return _scores(run, torch.where(visited & ~ever, most + 1, events), repr(self))


@dataclass(frozen=True)
class SelfInfluence(Importance):
    """Effect of each sample on its own loss, by an attribution method."""

    method: SelfAttributor = field(default_factory=TracIn)

    def __post_init__(self) -> None:
        require_kind("method", self.method, SelfAttributor, "`TracIn()` or `InfluenceFunction()`")

    def scores(self, run: Store) -> SampleScores:
        """Return the self-influence."""
        return self.method.self_influence(run, progress=False)


@dataclass(frozen=True)
class Lowest(Importance):
    """The reverse of another importance: the easiest samples score highest."""

    importance: Importance

    def __post_init__(self) -> None:
        require_kind("importance", self.importance, Importance, "`EL2N()`")

    def scores(self, run: Store) -> SampleScores:
        """Return the negative scores."""
        scores = self.importance.scores(run)
        return _scores(run, -scores.values, repr(self))


def _of_one_label(step: StepFacts, values: Float[Tensor, " n"] | None) -> Float[Tensor, " n"]:
    """Return these errors or margins of a step's visits, if the run holds them."""
    if values is None:
        raise ValueError(
            f"Step {step.index} holds no margins and errors of labels: its loss is "
            f"{step.loss or 'unknown'}; expected a cross-entropy of one label per sample, recorded "
            "with this version. Pass `importance=LabelLoss()`, `GraNd()` or `SelfInfluence()`, "
            "from `tda_lightning.applications`, or `SampleScores`."
        )
    return values


def _with_weight(
    step: StepFacts, values: Float[Tensor, " n"]
) -> tuple[Int[Tensor, " m"], Float[Tensor, " m"]]:
    """Return the samples and values of the visits whose loss has a weight.

    The values of the others are NaN, and their curvature is zero. That of a model which has
    diverged is NaN too.
    """
    if step.curvature is None:
        return step.sample_ids, values
    counts = ~values.isnan() | (step.curvature != 0)
    return step.sample_ids[counts], values[counts]


def _scores(run: Store, values: Float[Tensor, " n_train"], method: str) -> SampleScores:
    return SampleScores(values, run.train_ids(), method, provenance_of(run))
