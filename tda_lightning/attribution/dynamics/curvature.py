r"""Curvature: how the Hessian of a step's loss is built from what the step left behind.

Every kind gives a factor :math:`C` of a positive semi-definite matrix, so that neither the matrix
nor its eigenvectors are ever larger than the batch requires:

.. math:: H_t = C_t^\top C_t

The empirical Fisher takes the outer products of the visits' own rows, :math:`\sum_i r_i r_i^\top /
w_i`. It needs nothing else, and is too small where the model fits its data well. Rows from labels
drawn from the model's own predictions give the Gauss-Newton matrix without bias; see Kunstner et
al. (2019), "Limitations of the Empirical Fisher Approximation for Natural Gradient Descent".
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from tda_lightning.arguments import require_choice, require_kind, require_limit
from tda_lightning.stores.step import Step

_Known = TypeVar("_Known")
Terms = Literal["ignored", "independent"]


class Curvature(ABC):
    """A way to build the curvature of a step's loss."""

    @abstractmethod
    def factor(self, step: Step) -> Float[Tensor, "m k"]:
        """Return rows whose outer products sum to the curvature of the step's loss.

        Raises:
            ValueError: If the step does not hold what this takes.
        """

    def scaled_rows(self, step: Step) -> tuple[Float[Tensor, "m k"], Float[Tensor, " m"]]:
        """Return the factor as rows, and what to scale each of them by.

        Where the rows are ``step.sketch`` itself, their products with a direction are also the
        visits' scores, and need not be computed twice.
        """
        factor = self.factor(step)
        return factor, factor.new_ones(len(factor))


class _OwnRows(Curvature):
    """A kind whose factor is the visits' own rows, each scaled by a number."""

    @abstractmethod
    def scales(self, step: Step) -> Float[Tensor, " n"]:
        """Return the numbers.

        Raises:
            ValueError: If the step does not hold what this takes.
        """

    def factor(self, step: Step) -> Float[Tensor, "n k"]:
        """Return the rows, scaled."""
        return step.sketch * self.scales(step)[:, None]

    def scaled_rows(self, step: Step) -> tuple[Float[Tensor, "n k"], Float[Tensor, " n"]]:
        """Return the step's own rows, and the numbers."""
        return step.sketch, self.scales(step)


@dataclass(frozen=True)
class EmpiricalFisher(_OwnRows):
    """Outer products of the visits' own gradients: any run has them.

    Attributes:
        terms: What the terms of one sample's loss (tokens, say) are to each other. If
            ``"independent"``, the outer product of their mean is scaled up by their number.
    """

    terms: Terms = "ignored"

    def __post_init__(self) -> None:
        """Raise unless what terms are to each other is one of what they can be."""
        require_choice("terms", self.terms, Terms)

    def scales(self, step: Step) -> Float[Tensor, " n"]:
        """Return one over the roots of the visits' weights, times those of their terms if asked."""
        if self.terms == "ignored":
            return _over_weight(torch.ones_like(step.weights), step)
        terms = _known(step.terms, step, "numbers of loss terms", "EmpiricalFisher()")
        return _over_weight(terms, step)


@dataclass(frozen=True)
class LossWeighted(_OwnRows):
    """The empirical Fisher, each visit as large as the curvature of its loss.

    Exact for losses of one output; p / (1 - p) for the softmax of several.

    Attributes:
        limit: Largest factor. At 1, curvature is nowhere larger than the empirical Fisher's.
    """

    limit: float = math.inf

    def __post_init__(self) -> None:
        """Raise unless the limit leaves some curvature."""
        require_limit("limit", self.limit)

    def scales(self, step: Step) -> Float[Tensor, " n"]:
        """Return the roots of the losses' curvatures and terms, over those of the weights."""
        bent = _known(step.curvature, step, "loss curvatures", "EmpiricalFisher()")
        terms = torch.ones_like(bent) if step.terms is None else step.terms
        return _over_weight(bent.clamp(max=self.limit) * terms, step)


@dataclass(frozen=True)
class SampledLabels(Curvature):
    """Outer products of gradients for labels that the model draws itself: the Gauss-Newton matrix.

    Runs have them if they were recorded with curvature rows.
    """

    def factor(self, step: Step) -> Float[Tensor, "m k"]:
        """Return the recorded rows."""
        rows = _known(step.curvature_rows, step, "curvature rows", "BestAvailable()")
        if not rows.sum().isfinite() and not rows.isfinite().all():
            raise ValueError(
                f"Step {step.index} of the recording has rows of sampled labels that are not "
                "finite; expected finite ones. Pass `curvature=EmpiricalFisher()`, which does "
                "without, or record in a wider number format."
            )
        return rows


@dataclass(frozen=True)
class Mixed(Curvature):
    """The mean of several kinds.

    Attributes:
        parts: What to average.
    """

    parts: Sequence[Curvature] = (SampledLabels(), EmpiricalFisher())

    def __post_init__(self) -> None:
        """Raise unless there is something to average."""
        if not self.parts:
            raise ValueError(
                "`parts` is empty; expected kinds of curvature, `SampledLabels()` say."
            )
        for part in self.parts:
            require_kind("parts", part, Curvature, "`SampledLabels()`")

    def factor(self, step: Step) -> Float[Tensor, "m k"]:
        """Return all their rows, each kind with its share."""
        return torch.cat([part.factor(step) for part in self.parts]) / math.sqrt(len(self.parts))


@dataclass(frozen=True)
class SampledOrEmpirical(Curvature):
    """Sampled labels where a step has them, else the empirical Fisher.

    The default where curvature is averaged over many steps.
    """

    def factor(self, step: Step) -> Float[Tensor, "m k"]:
        """Return the best factor that the step allows."""
        return (EmpiricalFisher() if step.curvature_rows is None else SampledLabels()).factor(step)


@dataclass(frozen=True)
class BestAvailable(Curvature):
    """Sampled labels averaged with the empirical Fisher where a step has them, else the latter.

    The default where every step's own curvature counts: the average has less noise than either.
    """

    def factor(self, step: Step) -> Float[Tensor, "m k"]:
        """Return the best factor that the step allows."""
        return self._kind(step).factor(step)

    def scaled_rows(self, step: Step) -> tuple[Float[Tensor, "m k"], Float[Tensor, " m"]]:
        """Return what that kind does."""
        return self._kind(step).scaled_rows(step)

    def _kind(self, step: Step) -> Curvature:
        return EmpiricalFisher() if step.curvature_rows is None else Mixed()


def applied_curvature(steps: Sequence[Step], kind: Curvature) -> Float[Tensor, "k k"]:
    """Return the mean of what the steps applied: clipped where they were clipped."""
    total = torch.zeros(())
    for step in steps:
        total = _added(total, kind.factor(step), 1.0)
    return total.div_(len(steps))


def objective_curvature(steps: Sequence[Step], kind: Curvature) -> Float[Tensor, "k k"]:
    """Return the curvature of the objective that the steps share, to which each visit says as much.

    A step of few visits, as the last of an epoch may be, says less; one that was clipped does not.
    Its scale is that of the steps' mean weight.
    """
    total, weight, visits = torch.zeros(()), 0.0, 0
    for step in steps:
        own, n = float(step.weights.sum()), len(step.weights)
        total = _added(total, kind.factor(step), n / own if own > 0 else 0.0)
        weight, visits = weight + own, visits + n
    return total.mul_(weight / (len(steps) * max(visits, 1)))


def _added(total: Tensor, factor: Float[Tensor, "m k"], share: float) -> Float[Tensor, "k k"]:
    """Add to a matrix, in place, or to none."""
    k = factor.shape[1]
    matrix = total if total.ndim else factor.new_zeros(k, k)
    return matrix.addmm_(factor.mT, factor, alpha=share)


def _over_weight(squares: Float[Tensor, " n"], step: Step) -> Float[Tensor, " n"]:
    # A visit that weighs nothing has a row of zeros: it keeps it.
    return (squares / step.weights.clamp_min(1e-30)).sqrt()


def _known(value: _Known | None, step: Step, what: str, instead: str) -> _Known:
    if value is None:
        raise ValueError(
            f"Expected {what} in every step of the run; step {step.index} has none. Record them "
            f"with the `GradientRecorder`, or pass `curvature={instead}`, which does without."
        )
    return value
