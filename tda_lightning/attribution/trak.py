r"""TRAK: regress the model's answers on its gradients, as if it were linear in them.

For a loss :math:`-\log p`, the gradient of the margin :math:`\log p / (1 - p)` is the loss's own
gradient over :math:`1 - p`, with its sign turned. With these, :math:`\phi_i`, as features, training
is a logistic regression, and one Newton step away from it is

.. math:: s(q, i) = \phi_q^\top (\Phi^\top \Phi + \delta I)^{-1} \phi_i \, (1 - p_i)

Park et al. (2023), "TRAK: Attributing Model Behavior at Scale", eqs. 13 to 17. Queries are asked
about their loss, so :math:`\phi_q` is its gradient. Over several trainings, averages are taken of
the part up to :math:`\phi_i` and of :math:`1 - p_i`, each by itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Float
from torch import Tensor

from tda_lightning.arguments import require_not_negative
from tda_lightning.attribution.attributor import Attributor, Totals
from tda_lightning.attribution.linalg import damped_root
from tda_lightning.attribution.visits import as_own_gradients, last_visits
from tda_lightning.results.scores import Scores
from tda_lightning.stores import Store
from tda_lightning.stores.step import Step


@dataclass(frozen=True)
class TRAK(Attributor):
    r"""Linear regression on gradients of margins, at each sample's last visit.

    For losses that are the cross-entropy of one label per sample. Memory: two matrices of
    :math:`k \times k` numbers.

    Attributes:
        damping: Added to the diagonal, as a multiple of the mean of the diagonal. The paper adds
            none and takes far fewer dimensions than samples; as many want some.
    """

    damping: float = 1.0
    _factor: Tensor | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Raise unless the damping is a number that can be added."""
        require_not_negative("damping", self.damping)

    def require(self, run: Store) -> None:
        """Raise unless the last step tells of probabilities: all steps have one loss."""
        super().require(run)
        _doubts(run[-1])

    def directions(
        self, run: Store, queries: Float[Tensor, "n_query k"]
    ) -> Iterator[tuple[Step, Float[Tensor, "n_query k"]]]:
        """Look for one direction in all last visits."""
        root = self._root(run)
        direction = torch.cholesky_solve(queries.mT, root).mT
        for step in last_visits(run):
            yield as_own_gradients(step), direction

    def precomputed(self, run: Store, like: Tensor) -> TRAK:
        """Return a method that has factorized the features' moments, and keeps the factor."""
        return replace(self, _factor=self._root(run))

    def combine(
        self, total: Float[Tensor, "n_train n_query"], visits: Float[Tensor, "n_train 1"]
    ) -> Float[Tensor, "n_train n_query"]:
        """Average over what came twice in a sample's last step."""
        return total.div_(visits.clamp_min(1))

    def attribute_ensemble(
        self,
        runs: Sequence[Store],
        queries: Sequence[Float[Tensor, "n_query _"]],
        *,
        progress: bool = True,
    ) -> Scores:
        """Average over several trainings as the paper does (eq. 17).

        Args:
            runs: The recorded trainings, on the same data.
            queries: The queries, recorded for each of them.
            progress: Show progress bars.
        """
        doubts = [_mean_doubts(run) for run in runs]
        pairs = zip(runs, queries, strict=True)
        each = [self.attribute(run, rows, progress=progress) for run, rows in pairs]
        parts = [
            replace(scores, values=_over(scores.values, own))
            for scores, own in zip(each, doubts, strict=True)
        ]
        mean = Scores.mean(parts)
        return replace(mean, values=mean.values * torch.stack(doubts).mean(dim=0).to(mean.values))

    def _root(self, run: Store) -> Float[Tensor, "k k"]:
        """Return the Cholesky factor of the damped second moment of the features."""
        if self._factor is not None:
            return self._factor
        gram = torch.zeros(())
        for number, step in enumerate(last_visits(run)):
            features = _over(as_own_gradients(step).sketch.mT, _doubts(step)).mT
            gram = features.mT @ features if number == 0 else gram.addmm_(features.mT, features)
        return damped_root(gram, self.damping * float(gram.diagonal().mean()))


def _doubts(step: Step) -> Float[Tensor, " n"]:
    """Return one less the probability of each visit's label."""
    if step.curvature is None:
        raise ValueError(
            "`TRAK` needs the probability of every sample's label: expected loss curvatures in "
            f"every step; step {step.index} has none. Record a cross-entropy with the "
            "`GradientRecorder`, or use `InfluenceFunction()`, which does without."
        )
    if step.loss not in ("", "cross-entropy"):
        raise ValueError(
            f"`TRAK` is for the cross-entropy of classes, whose margins it regresses on; the loss "
            f"of step {step.index} is {step.loss}. Use `InfluenceFunction()` or `Unrolled()`."
        )
    if step.terms is not None and (step.terms > 1).any():
        raise ValueError(
            "`TRAK` is for losses of one label per sample: expected one loss term; step "
            f"{step.index} has a sample with {int(step.terms.max())}. Use `InfluenceFunction()`."
        )
    # Where there is no gradient left there is no doubt, and its curvature could not be told.
    is_sure = (step.curvature == 0) & (step.sketch == 0).all(dim=1)
    return torch.where(is_sure, 0, 1 / (1 + step.curvature))


def _over(values: Float[Tensor, "_ n"], doubts: Float[Tensor, " n"]) -> Float[Tensor, "_ n"]:
    """Divide by doubts; what is zero where there is none stays zero."""
    return values / torch.where(doubts == 0, 1, doubts).to(values)


def _mean_doubts(run: Store) -> Float[Tensor, " n_train"]:
    """Return the doubt about each training sample at its last visit, 1 if there was none."""
    totals = Totals(run.train_ids(), 1, torch.empty(0, dtype=run.recipe.torch_dtype))
    for step in last_visits(run):
        totals.add_(step.sample_ids, _doubts(step)[:, None].to(totals.values))
    means = totals.values / totals.visits.clamp_min(1)
    return torch.where(totals.visits > 0, means, 1)[:, 0]
