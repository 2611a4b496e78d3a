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
what the optimizer really did; see :mod:`tda_lightning.attribution.dynamics.optimizer`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from tda_lightning.arguments import require_kind
from tda_lightning.attribution.attributor import Attributor
from tda_lightning.attribution.dynamics.curvature import BestAvailable, Curvature
from tda_lightning.attribution.dynamics.optimizer import (
    Dynamics,
    require_training,
    warn_of_approximations,
)
from tda_lightning.attribution.dynamics.propagator import Exponential, Propagator, TamedCurvature
from tda_lightning.stores import Store
from tda_lightning.stores.step import Step


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
        return self._back(run, queries, lambda step, asked, seen: asked.direction())

    def visit_scores(
        self, run: Store, queries: Float[Tensor, "n_query k"]
    ) -> Iterator[tuple[Step, Float[Tensor, "n n_query"]]]:
        """Take the scores from the curvature's product where its rows are the visits' own."""
        return self._back(run, queries, _scores)

    def _back(
        self, run: Store, queries: Float[Tensor, "n_query k"], take: _Take
    ) -> Iterator[tuple[Step, Tensor]]:
        """Yield steps with what is taken of what the query asks of each, as often as it stands."""
        warn_of_approximations(run)
        adjoint = _Adjoint(queries.mT)
        for step in reversed(run):
            dynamics = Dynamics.of(step)
            rows, scales = self.curvature.scaled_rows(step)
            hessian = TamedCurvature(rows, scales, dynamics.brisk_rate, self.propagator)
            found: Tensor | None = None
            for _ in range(run.recipe.every_n_steps):
                asked = adjoint.ask_(dynamics)
                seen = asked.seen_by(rows)
                taken = take(step, asked, seen if rows is step.sketch else None)
                found = taken if found is None else found + taken
                adjoint.go_back_(dynamics, asked, hessian, seen)
            assert found is not None
            yield step, found


@dataclass(frozen=True)
class _Asked:
    """What the query asks of a step's gradient: a multiple of vectors that change later.

    Attributes:
        vectors: Before they are scaled, in columns, since products with rows are faster so.
        scale: Left to the products, which are far smaller.
    """

    vectors: Float[Tensor, "k n_query"]
    scale: float

    def direction(self) -> Float[Tensor, "n_query k"]:
        """Return the multiple."""
        return self.scale * self.vectors.mT

    def seen_by(self, rows: Float[Tensor, "m k"]) -> Float[Tensor, "m n_query"]:
        """Return its products with rows."""
        return (rows @ self.vectors).mul_(self.scale)


def _scores(step: Step, asked: _Asked, seen: Tensor | None) -> Float[Tensor, "n n_query"]:
    return asked.seen_by(step.sketch) if seen is None else seen


# Takes something of what is asked of a step, given what its visits' own rows see of it, if known.
_Take = Callable[[Step, _Asked, Tensor | None], Tensor]


class _Adjoint:
    """What the query asks of the weights and of momentum buffers, between two steps."""

    def __init__(self, queries: Float[Tensor, "k n_query"]) -> None:
        self._weights = queries.clone(memory_format=torch.contiguous_format)  # changes in place
        self._buffers: dict[float, Tensor] = {}  # of each optimizer

    def ask_(self, dynamics: Dynamics) -> _Asked:
        """Return what is asked of the step's gradient; buffers are then what they were before."""
        if dynamics.momentum == 0:
            return _Asked(self._weights, dynamics.rate)
        # Signs: a buffer is subtracted from the weights, so what is asked of it has theirs turned.
        buffered = dynamics.kept * dynamics.rate * self._weights
        if dynamics.owner in self._buffers:
            buffered += self._buffers[dynamics.owner]
        self._buffers[dynamics.owner] = dynamics.momentum * buffered
        if not dynamics.lookahead:
            return _Asked(buffered, dynamics.fresh)
        ahead = dynamics.lookahead * dynamics.rate * self._weights
        return _Asked(ahead.add_(buffered, alpha=dynamics.fresh), 1.0)

    def go_back_(
        self,
        dynamics: Dynamics,
        asked: _Asked,
        hessian: TamedCurvature,
        seen: Float[Tensor, "m n_query"],
    ) -> None:
        """Go back to before the step, given what was asked of it and what its curvature sees."""
        kept = 1 - dynamics.rate * dynamics.decoupled
        if dynamics.coupled:
            # Before the rest is scaled: what was asked may be the very vectors that change.
            self._weights.sub_(asked.vectors, alpha=dynamics.coupled * asked.scale / kept)
        if dynamics.decoupled:
            self._weights *= kept
        hessian.pull_(self._weights, seen)
