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

import torch
from jaxtyping import Float
from torch import Tensor

from tda_lightning.attribution.attributor import Attributor
from tda_lightning.attribution.curvature import BestAvailable, Curvature
from tda_lightning.attribution.dynamics import Dynamics
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

    def directions(
        self, run: Store, queries: Float[Tensor, "n_query k"]
    ) -> Iterator[tuple[Step, Float[Tensor, "n_query k"]]]:
        """Carry the query's gradient back, from the last step to the first."""
        adjoint = _Adjoint(queries)
        for step in reversed(run):
            dynamics = Dynamics.of(step)
            factor = self.curvature.factor(step)
            hessian = TamedCurvature(factor, dynamics.brisk_rate, self.propagator)
            direction = torch.zeros_like(queries)
            for _ in range(run.recipe.every_n_steps):
                direction += adjoint.back_(dynamics, hessian)
            yield step, direction


class _Adjoint:
    """What the query asks of the weights and of the momentum buffer, between two steps."""

    def __init__(self, queries: Float[Tensor, "n_query k"]) -> None:
        self._weights = queries
        self._buffer: Tensor | None = None

    def back_(self, dynamics: Dynamics, hessian: TamedCurvature) -> Float[Tensor, "n_query k"]:
        """Go back to before the step; return what the query asks of the step's gradient."""
        direction = self._ask_(dynamics)
        kept = 1 - dynamics.rate * dynamics.decoupled
        pull = hessian.times(direction)
        if dynamics.coupled:
            pull += dynamics.coupled * direction
        self._weights = kept * self._weights - pull if kept != 1 else self._weights - pull
        return direction

    def _ask_(self, dynamics: Dynamics) -> Float[Tensor, "n_query k"]:
        moved = dynamics.rate * self._weights
        if dynamics.momentum == 0:
            return moved
        # Signs: a buffer is subtracted from the weights, so what is asked of it has theirs turned.
        buffered = dynamics.momentum * moved if dynamics.lookahead else moved
        if self._buffer is not None:
            buffered = buffered + self._buffer
        self._buffer = dynamics.momentum * buffered
        return dynamics.fresh * buffered + (moved if dynamics.lookahead else 0)
