r"""SOURCE: the training, differentiated segment by segment instead of step by step.

The run is cut into segments. Within one, curvature :math:`\bar H_\ell`, rate :math:`\bar \eta_\ell`
and each sample's gradient :math:`\bar g_{i, \ell}` are taken to be their averages, so that its
:math:`K_\ell` steps become a power and a geometric series of one propagator
:math:`\varphi_\ell = \varphi(\bar \eta_\ell \bar H_\ell)`,

.. math:: s(q, i) = \sum_\ell \Big\langle \big( \textstyle\prod_{\ell' > \ell}
   \varphi_{\ell'}^{K_{\ell'}} \big) g_q, \; \bar \eta_\ell \big( \textstyle\sum_{j < K_\ell}
   \varphi_\ell^{\,j} \big) \, \bar g_{i, \ell} \Big\rangle

Bae et al. (2024), "Training Data Attribution via Approximate Unrolled Differentiation", section 3.
With :math:`\varphi(x) = e^{-x}` powers are their matrix exponentials :math:`e^{-\bar \eta K \bar
H}`, and the series is their :math:`(I - e^{-\bar \eta K \bar H}) \bar H^{-1}` times
:math:`x / (1 - e^{-x})`, which is nearly 1 for an averaged curvature, and makes a segment of one
step an unrolled step. Momentum is taken for a larger rate.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor

from tda_lightning.arguments import require_kind, require_whole
from tda_lightning.attribution.attributor import Attributor
from tda_lightning.attribution.dynamics.curvature import BestAvailable, Curvature, applied_curvature
from tda_lightning.attribution.dynamics.optimizer import (
    Extent,
    require_training,
    warn_of_approximations,
)
from tda_lightning.attribution.dynamics.propagator import Exponential, Propagator
from tda_lightning.stores import Store
from tda_lightning.stores.step import Step

# As many as in the paper.
_SEGMENTS = 3
# So many are averaged once for many queries; more would take memory that nothing bounds.
_KEPT = 8


@dataclass(frozen=True)
class Source(Attributor):
    r"""Unrolled differentiation of averaged segments.

    It costs two passes, an eigendecomposition of a :math:`k \times k` matrix per segment, and the
    memory of four such matrices; asked about many queries some at a time, of one for each of up to
    eight segments besides.

    Attributes:
        segments: How many segments to cut the run into, of equal length; ``None`` for three, or one
            per step where there are fewer.
        curvature: How to build each step's curvature.
        propagator: What is left of a displacement where a step overshoots.
    """

    segments: int | None = None
    curvature: Curvature = BestAvailable()
    propagator: Propagator = Exponential()
    _averaged: tuple[_Segment, ...] | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Check what Python does not."""
        if self.segments is not None:
            require_whole("segments", self.segments, least=1)
        require_kind("curvature", self.curvature, Curvature, "`BestAvailable()`")
        require_kind("propagator", self.propagator, Propagator, "`Exponential()` or `Linear()`")

    def require(self, run: Store) -> None:
        """Raise unless the run moved weights, in as many steps as there are to be segments."""
        super().require(run)
        require_training(run)
        _cut(run, self.segments)

    def directions(
        self, run: Store, queries: Float[Tensor, "n_query k"]
    ) -> Iterator[tuple[Step, Float[Tensor, "n_query k"]]]:
        """Look for one direction in all steps of a segment; go from the last segment back."""
        warn_of_approximations(run)
        remaining = queries
        parts = reversed(_cut(run, self.segments))
        for steps, segment in zip(parts, self._segments_back(run), strict=True):
            inside = remaining @ segment.vectors  # (n_query, k), along eigenvectors
            direction = inside * segment.reached @ segment.vectors.mT
            remaining = inside * segment.left @ segment.vectors.mT
            for step in steps:
                yield step, direction

    def precomputed(self, run: Store, like: Tensor) -> Source:
        """Return a method that has averaged all segments, if they are few: each takes a matrix."""
        if len(_cut(run, self.segments)) > _KEPT:
            return self
        return replace(self, _averaged=tuple(self._segments_back(run)))

    def _segments_back(self, run: Store) -> Iterator[_Segment]:
        """Yield what each segment does, from the last to the first."""
        if self._averaged is not None:
            return iter(self._averaged)
        return map(self._average, reversed(_cut(run, self.segments)))

    def _average(self, steps: Store) -> _Segment:
        count, stride = len(steps), steps.recipe.every_n_steps
        extent = Extent.of(steps)
        rate = extent.time / (count * stride)
        eigenvalues, vectors = torch.linalg.eigh(applied_curvature(steps, self.curvature))
        # Decay acts on top of the propagator, as it does where steps are unrolled.
        taken = self.propagator.taken(rate * eigenvalues.clamp_min(0)) + rate * extent.decay
        gone = _gone_after(count * stride, taken)
        series = gone / taken.clamp_min(torch.finfo(taken.dtype).tiny)
        series[taken == 0] = count * stride
        return _Segment(vectors, left=1 - gone, reached=rate * series / count)


def _gone_after(steps: int, taken: Float[Tensor, " k"]) -> Float[Tensor, " k"]:
    """Return what is gone after several steps that each take a share away."""
    # Shares far below rounding add up; shares above one, if asked for, turn signs.
    adding_up = -torch.expm1(steps * torch.log1p(-taken.clamp_max(0.5)))
    return torch.where(taken < 0.5, adding_up, 1 - (1 - taken) ** steps)


@dataclass(frozen=True)
class _Segment:
    """What a segment does along each eigenvector of its curvature.

    Attributes:
        vectors: The eigenvectors, as columns.
        left: What is left after it of a displacement before it.
        reached: What is left after it of a unit gradient in one of its steps, on average.
    """

    vectors: Float[Tensor, "k k"]
    left: Float[Tensor, " k"]
    reached: Float[Tensor, " k"]


def _cut(run: Store, segments: int | None) -> list[Store]:
    if segments is None:
        segments = min(_SEGMENTS, len(run))
    if segments > len(run):
        raise ValueError(
            f"`segments` is {segments}; expected a number from 1 to {len(run)}, the number of "
            "recorded steps. Leave it out to have as many as there can be, up to "
            f"{_SEGMENTS}."
        )
    ends = [len(run) * number // segments for number in range(segments + 1)]
    return [run[a:b] for a, b in pairwise(ends)]
