r"""Unrolled: had this visit not been, where would the rest of the training have led?

A visit moves the weights at its step, and every later step bends that displacement by its
curvature. Seen from the query, the direction to look for is carried back through the steps,

.. math:: s(q, i) = \sum_{t \,:\, i \in B_t} \eta_t \, \langle u_t, g_i^{(t)} \rangle, \qquad
   u_T = g_q, \qquad u_{t-1} = (I - \eta_t H_t)^\top u_t

Hara et al. (2019), "Data Cleansing for Models Trained with SGD", algorithm 2; Wang et al. (2025),
"Capturing the Temporal Dependence of Training Data Influence", whose data value embedding is
:func:`~tda_lightning.attribution.embed` of this method. Here all of it happens in sketch space,
where :math:`H_t` is a product of a few rows, so the pass costs little more than TracIn's and
nothing wants tuning. For momentum, weight decay and schedules the recursion is the transpose of
what the optimizer really did; see :mod:`tda_lightning.attribution.dynamics`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from tda_lightning.arguments import require_kind
from tda_lightning.attribution.attributor import Attributor
from tda_lightning.attribution.curvature import BestAvailable, Curvature
from tda_lightning.attribution.dynamics import (
    Dynamics,
    require_training,
    warn_of_approximations,
)
from tda_lightning.attribution.propagator import Exponential, Propagator, TamedCurvature
from tda_lightning.step import Step
from tda_lightning.stores import Store


@dataclass(frozen=True)
class Unrolled(Attributor):
    """The training, differentiated: one pass over the steps, last to first.

    A slice of a run is a training that ended with it. With a stride, each recorded step stands for
    as many equal ones.

    Attributes:
        curvature: How to build each step's curvature.
        propagator: What a step takes away. ``Linear()`` is exact for quadratic losses and small
            steps; the default was better, or no worse within error, on the benchmark's tasks.
    """

    curvature: Curvature = BestAvailable()
    propagator: Propagator = Exponential()

    def __post_init__(self) -> None:
        """Check what Python does not."""
        require_kind("curvature", self.curvature, Curvature, "`BestAvailable()`")
        require_kind("propagator", self.propagator, Propagator, "`Exponential()` or `Linear()`")

    def require(self, run: Store) -> None:
        """Raise unless the run moved weights."""
        super().require(run)
        require_training(run)

    def directions(
        self, run: Store, queries: Float[Tensor, "n_query k"]
    ) -> Iterator[tuple[Step, Float[Tensor, "n_query k"]]]:
        """Carry the query's gradient back, from the last step to the first."""
        for step, direction, _ in self._back(run, queries):
            yield step, direction

    def visit_scores(
        self, run: Store, queries: Float[Tensor, "n_query k"]
    ) -> Iterator[tuple[Step, Float[Tensor, "n n_query"]]]:
        """Take the scores from the curvature's product where its rows are the visits' own."""
        for step, direction, scores in self._back(run, queries):
            yield step, step.sketch @ direction.mT if scores is None else scores

    def _back(
        self, run: Store, queries: Float[Tensor, "n_query k"]
    ) -> Iterator[tuple[Step, Float[Tensor, "n_query k"], Float[Tensor, "n n_query"] | None]]:
        """Yield steps and directions, with the visits' scores if they came up on the way."""
        warn_of_approximations(run)
        adjoint = _Adjoint(queries)
        for step in reversed(run):
            dynamics = Dynamics.of(step)
            rows, scales = self.curvature.scaled_rows(step)
            hessian = TamedCurvature(rows, scales, dynamics.brisk_rate, self.propagator)
            direction, seen = adjoint.back_(dynamics, hessian)
            for _ in range(run.recipe.every_n_steps - 1):
                earlier, seen_earlier = adjoint.back_(dynamics, hessian)
                direction += earlier
                seen += seen_earlier
            yield step, direction, seen if rows is step.sketch else None


class _Adjoint:
    """What the query asks of the weights and of momentum buffers, between two steps."""

    def __init__(self, queries: Float[Tensor, "n_query k"]) -> None:
        self._weights = queries.clone()  # it changes in place
        self._buffers: dict[float, Tensor] = {}  # of each optimizer

    def back_(
        self, dynamics: Dynamics, hessian: TamedCurvature
    ) -> tuple[Float[Tensor, "n_query k"], Float[Tensor, "m n_query"]]:
        """Go back to before the step.

        Returns:
            What the query asks of the step's gradient, and what the curvature's rows see of that.
        """
        direction = self._ask_(dynamics)
        seen = hessian.seen(direction)
        if dynamics.decoupled:
            self._weights *= 1 - dynamics.rate * dynamics.decoupled
        if dynamics.coupled:
            self._weights -= dynamics.coupled * direction
        hessian.pull_(self._weights, seen)
        return direction, seen

    def _ask_(self, dynamics: Dynamics) -> Float[Tensor, "n_query k"]:
        moved = dynamics.rate * self._weights
        if dynamics.momentum == 0:
            return moved
        # Signs: a buffer is subtracted from the weights, so what is asked of it has theirs turned.
        buffered = dynamics.kept * moved
        if dynamics.owner in self._buffers:
            buffered = buffered + self._buffers[dynamics.owner]
        self._buffers[dynamics.owner] = dynamics.momentum * buffered
        direction = dynamics.fresh * buffered
        return direction + dynamics.lookahead * moved if dynamics.lookahead else direction
