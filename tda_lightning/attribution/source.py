r"""SOURCE: differentiate the training segment by segment instead of step by step.

The run is cut into segments. Within a segment, curvature :math:`\bar H_\ell`, rate
:math:`\bar \eta_\ell` and each sample's gradient :math:`\bar g_{i, \ell}` are replaced by their
averages. The :math:`K_\ell` steps of a segment then become a power and a geometric series of one
propagator :math:`\varphi_\ell = \varphi(\bar \eta_\ell \bar H_\ell)`,

.. math:: s(q, i) = \sum_\ell \big\langle \big( \textstyle\prod_{\ell' > \ell}
   \varphi_{\ell'}^{K_{\ell'}} \big) g_q, \; \bar \eta_\ell \big( \textstyle\sum_{j < K_\ell}
   \varphi_\ell^{\,j} \big) \, \bar g_{i, \ell} \big\rangle

Bae et al. (2024), "Training Data Attribution via Approximate Unrolled Differentiation", section 3.
With :math:`\varphi(x) = e^{-x}`, the powers are their matrix exponentials
:math:`e^{-\bar \eta K \bar H}`. The series is their :math:`(I - e^{-\bar \eta K \bar H})
\bar H^{-1}` times :math:`x / (1 - e^{-x})`. That factor is nearly 1 for an averaged curvature, and
makes a segment of one step equal to an unrolled step. Momentum is modelled as a larger rate.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor

from tda_lightning.attribution.attributor import Attributor
from tda_lightning.attribution.dynamics.curvature import BestAvailable, Curvature, applied_curvature
from tda_lightning.attribution.dynamics.optimizer import (
    Extent,
    require_training,
    warn_of_approximations,
)
from tda_lightning.attribution.dynamics.propagator import Exponential, Propagator
from tda_lightning.attribution.linalg import eigendecomposition
from tda_lightning.stores import Store
from tda_lightning.stores.arguments import require_kind, require_whole
from tda_lightning.stores.step import Step

_DEFAULT_SEGMENTS = 3  # as in the paper
_MAX_PRECOMPUTED_SEGMENTS = 8  # each takes a matrix of k x k numbers


@dataclass(frozen=True)
class Source(Attributor):
    r"""Unrolled differentiation of averaged segments.

    It takes two passes over the run, and an eigendecomposition of a :math:`k \times k` matrix per
    segment. Memory: seven such matrices. When many queries are scored in batches, one matrix per
    segment is stored in addition, for up to eight segments.

    Attributes:
        segments: Number of segments of equal length. With ``None``, it is three, or the number of
            steps if that is less.
        curvature: How to build the curvature of each step.
        propagator: How much of a displacement a step leaves, in particular where it overshoots.
    """

    segments: int | None = None
    curvature: Curvature = BestAvailable()
    propagator: Propagator = Exponential()
    _averaged: tuple[_Segment, ...] | None = field(
        default=None, init=False, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        if self.segments is not None:
            require_whole("segments", self.segments, least=1)
        require_kind("curvature", self.curvature, Curvature, "`BestAvailable()`")
        require_kind("propagator", self.propagator, Propagator, "`Exponential()` or `Linear()`")

    def require(self, run: Store) -> None:
        """Check that the run is a training with at least one step per segment."""
        super().require(run)
        require_training(run)
        _split(run, self.segments)

    def directions(
        self, run: Store, queries: Float[Tensor, "n_query k"]
    ) -> Iterator[tuple[Step, Float[Tensor, "n_query k"]]]:
        """Yield the steps with one direction per segment, from the last segment to the first."""
        warn_of_approximations(run)
        propagated = queries  # times the powers of all later segments
        parts = reversed(_split(run, self.segments))
        for steps, segment in zip(parts, self._segments_backward(run), strict=True):
            projected = propagated @ segment.vectors  # (n_query, k), along eigenvectors
            direction = projected * segment.series @ segment.vectors.mT
            propagated = projected * segment.power @ segment.vectors.mT
            for step in steps:
                yield step, direction

    def precomputed(self, run: Store, like: Tensor) -> Source:
        """Return a method that stores the averaged segments, if there are at most eight."""
        if len(_split(run, self.segments)) > _MAX_PRECOMPUTED_SEGMENTS:
            return self
        return self._with(_averaged=tuple(self._segments_backward(run)))

    def _segments_backward(self, run: Store) -> Iterator[_Segment]:
        """Yield the averaged segments, from the last to the first."""
        if self._averaged is not None:
            return iter(self._averaged)
        return map(self._average, reversed(_split(run, self.segments)))

    def _average(self, steps: Store) -> _Segment:
        n_recorded = len(steps)
        K = n_recorded * steps.recipe.every_n_steps
        extent = Extent.of(steps)
        eta = extent.total_lr / K
        eigenvalues, vectors = eigendecomposition(applied_curvature(steps, self.curvature))
        # Decay acts on top of the propagator, as in an unrolled step.
        one_minus_phi = self.propagator.taken(eta * eigenvalues.clamp_min(0)) + eta * extent.decay
        one_minus_power = _one_minus_power(one_minus_phi, K)
        series = one_minus_power / one_minus_phi.clamp_min(torch.finfo(one_minus_phi.dtype).tiny)
        series[one_minus_phi == 0] = K
        return _Segment(vectors, power=1 - one_minus_power, series=eta * series / n_recorded)


def _one_minus_power(one_minus_phi: Float[Tensor, " k"], exponent: int) -> Float[Tensor, " k"]:
    """Return ``1 - phi ** exponent``, accurately for ``phi`` near 1."""
    # A propagator with a limit above 1 may make phi negative, which has no logarithm.
    by_logarithm = -torch.expm1(exponent * torch.log1p(-one_minus_phi.clamp_max(0.5)))
    return torch.where(one_minus_phi < 0.5, by_logarithm, 1 - (1 - one_minus_phi) ** exponent)


@dataclass(frozen=True)
class _Segment:
    r"""The effect of a segment along each eigenvector of its averaged curvature.

    Attributes:
        vectors: The eigenvectors, as columns.
        power: :math:`\varphi^K`, the share of an earlier displacement that the segment leaves.
        series: :math:`\bar \eta \sum_{j < K} \varphi^j` over the number of recorded steps: the
            displacement that a unit gradient in one of them leaves on average.
    """

    vectors: Float[Tensor, "k k"]
    power: Float[Tensor, " k"]
    series: Float[Tensor, " k"]


def _split(run: Store, segments: int | None) -> list[Store]:
    if segments is None:
        segments = min(_DEFAULT_SEGMENTS, len(run))
    if segments > len(run):
        raise ValueError(
            f"`segments` is {segments}; expected a number from 1 to {len(run)}, the number of "
            f"recorded steps. Omit it for as many as possible, up to {_DEFAULT_SEGMENTS}."
        )
    ends = [len(run) * number // segments for number in range(segments + 1)]
    return [run[a:b] for a, b in pairwise(ends)]
