r"""Curvature: how to build the Hessian of a step's loss from the step's recorded rows.

Every kind gives a factor :math:`C` of a positive semi-definite matrix. It has few rows, so neither
the matrix nor its eigenvectors need more memory than the batch requires:

.. math:: H_t = C_t^\top C_t

The empirical Fisher sums the outer products of the visits' rows, :math:`\sum_i r_i r_i^\top / w_i`.
It needs nothing else, but is too small where the model fits its data well, and too large where a
label is wrong; see Kunstner et al. (2019), "Limitations of the Empirical Fisher Approximation for
Natural Gradient Descent". Weights from the loss correct most of that, at no cost. Rows from labels
drawn from the model's own predictions give the Gauss-Newton matrix without bias.
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

from tda_lightning.attribution.linalg import SumOfOuterProducts
from tda_lightning.stores.arguments import require_choice, require_kind
from tda_lightning.stores.step import Step

_T = TypeVar("_T")
Terms = Literal["ignored", "independent"]
# A visit of weight zero has a row of zeros, which any finite scale leaves at zero.
_LEAST_WEIGHT = 1e-30
# Numbers of terms are computed in single precision.
_ROUNDING = 1e-3


class Curvature(ABC):
    """A way to build the curvature of a step's loss."""

    @abstractmethod
    def factor(self, step: Step) -> Float[Tensor, "m k"]:
        """Return rows whose outer products sum to the curvature of the step's loss.

        Raises:
            ValueError: If the step lacks a recording that this kind needs.
        """

    def scaled_rows(self, step: Step) -> tuple[Float[Tensor, "m k"], Float[Tensor, " m"]]:
        """Return unscaled rows and their scales; the products are the rows of the factor.

        Where the rows are ``step.sketch`` itself, their products with a direction are also the
        visits' scores, and need not be computed twice.
        """
        factor = self.factor(step)
        return factor, factor.new_ones(len(factor))


class _VisitCurvature(Curvature):
    """A kind whose factor consists of the visits' rows, each with a scale."""

    @abstractmethod
    def scales(self, step: Step) -> Float[Tensor, " n"]:
        """Return the scale of each visit's row.

        Raises:
            ValueError: If the step lacks a recording that this kind needs.
        """

    def factor(self, step: Step) -> Float[Tensor, "n k"]:
        """Return the scaled rows of the visits."""
        return step.sketch * self.scales(step)[:, None]

    def scaled_rows(self, step: Step) -> tuple[Float[Tensor, "n k"], Float[Tensor, " n"]]:
        """Return the rows of the visits and their scales."""
        return step.sketch, self.scales(step)


@dataclass(frozen=True)
class EmpiricalFisher(_VisitCurvature):
    """Outer products of the visits' gradients; available in every run.

    Attributes:
        terms: How to treat the terms of one sample's loss, such as tokens. With ``"independent"``,
            the outer product of their mean is multiplied by their number; with ``"ignored"``, it is
            not.
    """

    terms: Terms = "ignored"

    def __post_init__(self) -> None:
        require_choice("terms", self.terms, Terms)

    def scales(self, step: Step) -> Float[Tensor, " n"]:
        """Return 1 / sqrt(weight) of each visit, times sqrt(terms) if they are independent."""
        if self.terms == "ignored":
            return _root_over_weight(torch.ones_like(step.weights), step)
        terms = _require_recorded(step.terms, step, "numbers of loss terms", "EmpiricalFisher()")
        return _root_over_weight(terms, step)


@dataclass(frozen=True)
class LossWeighted(_VisitCurvature):
    r"""The empirical Fisher, with each visit weighted by the curvature of its loss.

    Let a visit have weight :math:`w`, row :math:`r` and :math:`T` loss terms. Let :math:`c` be the
    trace of its loss's Hessian at the model's outputs, over the squared gradient there. Then
    :math:`c T r r^\top / w` has the trace that labels drawn from the model would give on average.
    For losses of one output or two classes, it is the Gauss-Newton matrix itself.

    Otherwise one direction stands for several. There, the geometric mean with the empirical Fisher
    agrees better with retraining: :math:`\sqrt{\alpha c T} \, r r^\top / w`. For a cross-entropy,
    :math:`\alpha = 1`. For others it scales the Fisher of the step to the trace of all
    :math:`c r r^\top / w`, so that the unit of the outputs does not matter. Visits whose
    :math:`c` is unknown are not weighted.
    """

    def scales(self, step: Step) -> Float[Tensor, " n"]:
        """Return the root of the factor of each visit's outer product."""
        c = _require_recorded(step.trace_ratio, step, "loss curvatures", "EmpiricalFisher()")
        T = _require_recorded(step.terms, step, "numbers of loss terms", "EmpiricalFisher()")
        if _is_gauss_newton(step):
            return _root_over_weight(c, step)
        alpha = 1 if step.loss == "cross-entropy" else _mean_ratio(c, step)
        factors = torch.where(c.isnan(), 1, (alpha * c * T).sqrt())
        return _root_over_weight(factors, step)


def _mean_ratio(c: Float[Tensor, " n"], step: Step) -> Tensor:
    """Return the mean of ``c``, weighted by the traces of the visits' outer products."""
    norms: Tensor = torch.linalg.vector_norm(step.sketch, dim=1)
    traces = norms.square() / step.weights.clamp_min(_LEAST_WEIGHT)
    return (c * traces).nansum() / traces.sum().clamp_min(torch.finfo(traces.dtype).tiny)


def _is_gauss_newton(step: Step) -> bool:
    """Return whether weights from the loss give a step's Gauss-Newton matrix itself.

    They do if every visit has one loss term, of one output or of two classes.
    """
    if step.trace_ratio is None or step.curvature is None or step.terms is None:
        return False
    # Then there is no other curvature than that of the label; the recorder stores it twice.
    is_one_output = torch.equal(step.trace_ratio, step.curvature)
    return is_one_output and bool(((step.terms - 1).abs() < _ROUNDING).all())


@dataclass(frozen=True)
class SampledLabels(Curvature):
    """Outer products of gradients for labels drawn by the model: the Gauss-Newton matrix.

    Available in runs that were recorded with curvature rows. If labels were sampled at a share of
    the steps, the factor of the other steps has no rows, and sums over steps are still unbiased.
    """

    def factor(self, step: Step) -> Float[Tensor, "m k"]:
        """Return the recorded curvature rows."""
        rows = _require_recorded(step.curvature_rows, step, "curvature rows", "BestAvailable()")
        if not rows.sum().isfinite() and not rows.isfinite().all():
            raise ValueError(
                f"Step {step.index} of the recording has rows of sampled labels that are not "
                "finite; expected finite ones. Pass `curvature=EmpiricalFisher()`, which does not "
                "use them, or record in a wider number format."
            )
        return rows


@dataclass(frozen=True)
class Mixed(Curvature):
    """The mean of several kinds of curvature.

    Attributes:
        parts: The kinds to average.
    """

    parts: Sequence[Curvature] = (SampledLabels(), LossWeighted())

    def __post_init__(self) -> None:
        if not self.parts:
            raise ValueError(
                "`parts` is empty; expected kinds of curvature, such as `SampledLabels()`."
            )
        for part in self.parts:
            require_kind("parts", part, Curvature, "`SampledLabels()`")

    def factor(self, step: Step) -> Float[Tensor, "m k"]:
        """Return the rows of all kinds, scaled so that their outer products are averaged."""
        return torch.cat([part.factor(step) for part in self.parts]) / math.sqrt(len(self.parts))


class _BestKind(Curvature):
    """The best of the kinds that a step allows."""

    @abstractmethod
    def _kind(self, step: Step) -> Curvature:
        """Return the kind to use for the step."""

    def factor(self, step: Step) -> Float[Tensor, "m k"]:
        """Return the best factor that the step allows."""
        return self._kind(step).factor(step)

    def scaled_rows(self, step: Step) -> tuple[Float[Tensor, "m k"], Float[Tensor, " m"]]:
        """Return the scaled rows of the best kind that the step allows."""
        return self._kind(step).scaled_rows(step)


@dataclass(frozen=True)
class SampledOrWeighted(_BestKind):
    """Sampled labels if a step has them, otherwise its visits, weighted by the loss if possible.

    The default of methods that average curvature over many steps. Where weights from the loss give
    the Gauss-Newton matrix itself, sampled labels are not used.
    """

    def _kind(self, step: Step) -> Curvature:
        return SampledLabels() if _gains_by_labels(step) else _best_of_visits(step)


@dataclass(frozen=True)
class BestAvailable(_BestKind):
    """The mean of sampled labels and weighted visits if a step has both, otherwise the latter.

    The default of methods that use the curvature of every single step: the mean has less noise than
    either kind. Where weights from the loss give the Gauss-Newton matrix itself, sampled labels are
    not used. In runs of older versions, visits are not weighted.
    """

    def _kind(self, step: Step) -> Curvature:
        of_visits = _best_of_visits(step)
        return Mixed((SampledLabels(), of_visits)) if _gains_by_labels(step) else of_visits


def _best_of_visits(step: Step) -> _VisitCurvature:
    return EmpiricalFisher() if step.trace_ratio is None else LossWeighted()


def _gains_by_labels(step: Step) -> bool:
    return step.curvature_rows is not None and not _is_gauss_newton(step)


def applied_curvature(steps: Sequence[Step], kind: Curvature) -> Float[Tensor, "k k"]:
    """Return the mean curvature of the steps as applied, with their clipping."""
    products, rows = SumOfOuterProducts(), 0
    for step in steps:
        factor = kind.factor(step)
        products.add(factor)
        rows += len(factor)
    _require_rows(rows, steps)
    return products.matrix().div_(len(steps))


def objective_curvature(steps: Sequence[Step], kind: Curvature) -> Float[Tensor, "k k"]:
    """Return the curvature of the objective that the steps share, in which all visits count alike.

    A step with fewer visits, such as the last of an epoch, counts less; a clipped step does not.
    The scale is that of the steps' mean weight.
    """
    products, total_weight, visits, rows = SumOfOuterProducts(), 0.0, 0, 0
    for step in steps:
        weight, n, factor = float(step.weights.sum()), len(step.weights), kind.factor(step)
        products.add(factor, n / weight if weight > 0 else 0.0)
        total_weight, visits, rows = total_weight + weight, visits + n, rows + len(factor)
    _require_rows(rows, steps)
    return products.matrix().mul_(total_weight / (len(steps) * max(visits, 1)))


def _require_rows(count: int, steps: Sequence[Step]) -> None:
    if count == 0 and len(steps):
        raise ValueError(
            f"The curvature of these {len(steps)} steps, from step {steps[0].index} on, has no "
            "rows; expected a step with sampled labels, which this run has at a share of its "
            "steps. Use more steps, or pass `curvature=EmpiricalFisher()`."
        )


def _root_over_weight(squares: Float[Tensor, " n"], step: Step) -> Float[Tensor, " n"]:
    return (squares / step.weights.clamp_min(_LEAST_WEIGHT)).sqrt()


def _require_recorded(value: _T | None, step: Step, name: str, alternative: str) -> _T:
    if value is None:
        raise ValueError(
            f"Expected {name} in every step of the run; step {step.index} has none. Record them "
            f"with the `GradientRecorder`, or pass `curvature={alternative}`, which does not need "
            "them."
        )
    return value
