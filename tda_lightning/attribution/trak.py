r"""TRAK: regress the model's outputs on its gradients, as if the model were linear in them.

For a loss :math:`-\log p`, the gradient of the margin :math:`\log p / (1 - p)` is the loss's own
gradient over :math:`1 - p`, with the opposite sign. With these, :math:`\phi_i`, as features,
training is a logistic regression, and one Newton step away from it is

.. math:: s(q, i) = \phi_q^\top (\Phi^\top \Phi + \delta I)^{-1} \phi_i \, (1 - p_i)

Park et al. (2023), "TRAK: Attributing Model Behavior at Scale", eqs. 13 to 17. Here queries are
about the loss, so :math:`\phi_q` is its gradient. Over several trainings, the part up to
:math:`\phi_i` and :math:`1 - p_i` are averaged separately.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Float
from torch import Tensor

from tda_lightning.attribution.attributor import Attributor, Totals, mean_over_visits
from tda_lightning.attribution.linalg import SumOfOuterProducts, damped_root
from tda_lightning.attribution.steps import last_visits, unweighted
from tda_lightning.results.scores import Scores
from tda_lightning.stores import Store
from tda_lightning.stores.arguments import require_not_negative
from tda_lightning.stores.step import Step


@dataclass(frozen=True)
class TRAK(Attributor):
    r"""Linear regression on the gradients of margins, at each sample's last visit.

    The training loss must be the cross-entropy of one label per sample. Memory: two matrices of
    :math:`k \times k` numbers.

    Attributes:
        damping: Added to the diagonal of the features' second moments, as a multiple of its mean.
            The paper adds none, but uses far fewer dimensions than samples; with as many
            dimensions as samples, some damping is needed.
    """

    damping: float = 1.0
    _factor: Tensor | None = field(default=None, init=False, repr=False, compare=False)
    combine = mean_over_visits  # A sample may occur several times in its last step.

    def __post_init__(self) -> None:
        require_not_negative("damping", self.damping)

    def require(self, run: Store) -> None:
        """Check that the last step holds label probabilities: all steps share one loss."""
        super().require(run)
        _one_minus_p(run[-1])

    def directions(
        self, run: Store, queries: Float[Tensor, "n_query k"]
    ) -> Iterator[tuple[Step, Float[Tensor, "n_query k"]]]:
        """Yield the last visits of all samples, with the same direction for each."""
        direction = torch.cholesky_solve(queries.mT, self._root(run)).mT
        for step in last_visits(run):
            # phi_i * (1 - p_i) is the gradient of the sample's loss.
            yield unweighted(step), direction

    def precomputed(self, run: Store, like: Tensor) -> TRAK:
        """Return a method that stores the factorized second moments of the features."""
        return self._with(_factor=self._root(run))

    def attribute_ensemble(
        self,
        runs: Sequence[Store],
        queries: Sequence[Float[Tensor, "n_query _"]],
        *,
        progress: bool = True,
    ) -> Scores:
        """Average over several trainings, as in eq. 17 of the paper."""
        one_minus_p = [_mean_one_minus_p(run) for run in runs]
        pairs = zip(runs, queries, strict=True)
        all_scores = [self.attribute(run, rows, progress=progress) for run, rows in pairs]
        parts = [
            replace(scores, values=_divide(scores.values, divisor))
            for scores, divisor in zip(all_scores, one_minus_p, strict=True)
        ]
        mean = Scores.mean(parts)
        mean_one_minus_p = torch.stack(one_minus_p).mean(dim=0)
        return replace(mean, values=mean.values * mean_one_minus_p.to(mean.values))

    def _root(self, run: Store) -> Float[Tensor, "k k"]:
        """Return the Cholesky factor of the features' damped second moments."""
        if self._factor is not None:
            return self._factor
        products = SumOfOuterProducts()
        for step in last_visits(run):
            products.add(_divide(unweighted(step).sketch.mT, _one_minus_p(step)).mT)
        gram = products.matrix()
        return damped_root(gram, self.damping * float(gram.diagonal().mean()))


def _one_minus_p(step: Step) -> Float[Tensor, " n"]:
    """Return 1 - p for each visit, with the probability p of its label."""
    if step.curvature is None:
        raise ValueError(
            "`TRAK` needs the probability of every sample's label: expected loss curvatures in "
            f"every step; step {step.index} has none. Record a cross-entropy with the "
            "`GradientRecorder`, or use `InfluenceFunction()`, which does not need them."
        )
    if step.loss not in ("", "cross-entropy"):
        raise ValueError(
            "`TRAK` regresses on margins of classes: expected the cross-entropy of classes; the "
            f"loss of step {step.index} is {step.loss}. Use `InfluenceFunction()` or `Unrolled()`."
        )
    if step.terms is not None and (step.terms > 1).any():
        raise ValueError(
            "`TRAK` supports losses of one label per sample: expected one loss term; step "
            f"{step.index} has a sample with {int(step.terms.max())}. Use `InfluenceFunction()`."
        )
    # A sample that is fitted exactly has no gradient, and its curvature is recorded as zero.
    is_fitted = (step.curvature == 0) & (step.sketch == 0).all(dim=1)
    return torch.where(is_fitted, 0, 1 / (1 + step.curvature))


def _divide(values: Float[Tensor, "_ n"], one_minus_p: Float[Tensor, " n"]) -> Float[Tensor, "_ n"]:
    """Divide by ``one_minus_p``; where that is zero, the values are zero and stay zero."""
    return values / torch.where(one_minus_p == 0, 1, one_minus_p).to(values)


def _mean_one_minus_p(run: Store) -> Float[Tensor, " n_train"]:
    """Return 1 - p of each training sample at its last visit; 1 for samples never drawn."""
    totals = Totals(run.train_ids(), 1, torch.empty(0, dtype=run.recipe.torch_dtype))
    for step in last_visits(run):
        totals.add_(step.sample_ids, _one_minus_p(step)[:, None].to(totals.values))
    return torch.where(totals.visits > 0, totals.means(), 1)[:, 0]
