r"""Unrolled: where would the rest of the training have led without this visit?

A visit moves the weights at its step. Every later step multiplies that displacement by
:math:`I - \eta_t H_t`. Instead of the displacements, the query's gradient is carried back through
the steps,

.. math:: s(q, i) = \sum_{t \,:\, i \in B_t} \eta_t \, \langle u_t, g_i^{(t)} \rangle, \qquad
   u_T = g_q, \qquad u_{t-1} = (I - \eta_t H_t)^\top u_t

Hara et al. (2019), "Data Cleansing for Models Trained with SGD", algorithm 2; Wang et al. (2025),
"Capturing the Temporal Dependence of Training Data Influence", whose data value embedding is
:func:`~tda_lightning.attribution.embed` of this method. Here the recursion runs in sketch space,
where :math:`H_t` is a product of a few rows. The pass costs little more than TracIn's, and needs no
tuning. With momentum, weight decay and schedules, the recursion is the transpose of the optimizer's
update; see :mod:`tda_lightning.attribution.dynamics.optimizer`.

Self-influence needs no model: the gradient of a sample's own loss is taken from its last visit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from tda_lightning.attribution.attributor import SelfAttributor
from tda_lightning.attribution.dynamics.curvature import BestAvailable, Curvature
from tda_lightning.attribution.dynamics.optimizer import (
    Dynamics,
    require_training,
    warn_of_approximations,
)
from tda_lightning.attribution.dynamics.propagator import Exponential, LimitedCurvature, Propagator
from tda_lightning.attribution.steps import last_gradients, steps_backward
from tda_lightning.stores import Store
from tda_lightning.stores.arguments import require_kind
from tda_lightning.stores.step import Step


@dataclass(frozen=True)
class Unrolled(SelfAttributor):
    """Differentiation of the whole training, in one pass from the last step to the first.

    A slice of a run counts as a training that ended with it. In a run that was recorded with a
    stride, each recorded step represents as many equal ones. Where labels were sampled at a share
    of the steps, their rows are averaged over some later steps, until there are at least 256.

    Attributes:
        curvature: How to build the curvature of each step.
        propagator: How much of a displacement a step leaves. ``Linear()`` is exact for quadratic
            losses and small steps. The default was better on the benchmark's tasks, or equal within
            the error.
    """

    curvature: Curvature = BestAvailable()
    propagator: Propagator = Exponential()

    def __post_init__(self) -> None:
        require_kind("curvature", self.curvature, Curvature, "`BestAvailable()`")
        require_kind("propagator", self.propagator, Propagator, "`Exponential()` or `Linear()`")

    def require(self, run: Store) -> None:
        """Check that the run is a training."""
        super().require(run)
        require_training(run)

    def directions(
        self, run: Store, queries: Float[Tensor, "n_query k"]
    ) -> Iterator[tuple[Step, Float[Tensor, "n_query k"]]]:
        """Yield the steps, last to first, with the query's gradient carried back to each."""
        return self._backward(run, queries, lambda step, adjoint, products: adjoint.direction())

    def visit_scores(
        self, run: Store, queries: Float[Tensor, "n_query k"]
    ) -> Iterator[tuple[Step, Float[Tensor, "n n_query"]]]:
        """Yield the steps with their visits' scores, reusing the curvature's products."""
        return self._backward(run, queries, _scores)

    def own_scores(self, run: Store) -> Iterator[tuple[Step, Float[Tensor, " n"]]]:
        """Yield the steps with the effect of each visit on its sample's own loss at the end.

        The cost is that of ``min(n_train, k)`` queries. Memory: three matrices of as many rows of
        ``k`` numbers, and one of ``(n_train, k)``.
        """
        train_ids = run.train_ids()
        gradients = last_gradients(run, train_ids)  # g_q of the equation, for q = i
        n_train, k = gradients.shape
        unit_vectors = torch.eye(k, dtype=gradients.dtype, device=gradients.device)
        queries = gradients if n_train <= k else unit_vectors
        for step, directions in self.directions(run, queries):
            positions = torch.searchsorted(train_ids, step.sample_ids).to(gradients.device)
            u = directions[positions] if n_train <= k else gradients[positions] @ directions
            yield step, (u * step.sketch).sum(dim=1)

    def _backward(
        self, run: Store, queries: Float[Tensor, "n_query k"], take: _Take
    ) -> Iterator[tuple[Step, Tensor]]:
        """Yield each step with ``take(...)``, summed over the steps that it represents."""
        warn_of_approximations(run)
        state = _StateAdjoint(queries.mT)
        for step in steps_backward(run):
            dynamics = Dynamics.of(step)
            rows, scales = self.curvature.scaled_rows(step)
            hessian = LimitedCurvature(rows, scales, dynamics.effective_lr, self.propagator)
            total: Tensor | None = None
            for _ in range(run.recipe.every_n_steps):
                adjoint = state.gradient_adjoint_(dynamics)
                products = adjoint.products_with(rows)
                term = take(step, adjoint, products if rows is step.sketch else None)
                total = term if total is None else total + term
                state.step_back_(dynamics, adjoint, hessian, products)
            assert total is not None
            yield step, total


@dataclass(frozen=True)
class _GradientAdjoint:
    r"""The adjoint of a step's gradient, :math:`\eta_t u_t` without momentum.

    It is a multiple of vectors, which may be the state's: those change in place later.

    Attributes:
        vectors: The unscaled vectors as columns, for faster products with rows.
        scale: The multiple. It is applied to the products, which are far smaller.
    """

    vectors: Float[Tensor, "k n_query"]
    scale: float

    def direction(self) -> Float[Tensor, "n_query k"]:
        """Return the adjoint as rows."""
        return self.scale * self.vectors.mT

    def products_with(self, rows: Float[Tensor, "m k"]) -> Float[Tensor, "m n_query"]:
        """Return the inner products of rows with the adjoint."""
        return (rows @ self.vectors).mul_(self.scale)


def _scores(
    step: Step, adjoint: _GradientAdjoint, products: Tensor | None
) -> Float[Tensor, "n n_query"]:
    return adjoint.products_with(step.sketch) if products is None else products


# From a step, the adjoint of its gradient, and the products of its visits' rows with that adjoint
# (``None`` if they were not computed), compute the result of the step.
_Take = Callable[[Step, _GradientAdjoint, Tensor | None], Tensor]


class _StateAdjoint:
    """The adjoints of the weights and of the momentum buffers between two steps."""

    def __init__(self, queries: Float[Tensor, "k n_query"]) -> None:
        # u_t of the equation; a copy, since it changes in place.
        self._u = queries.clone(memory_format=torch.contiguous_format)
        self._buffers: dict[float, Tensor] = {}  # by the owner of the momentum buffer

    def gradient_adjoint_(self, dynamics: Dynamics) -> _GradientAdjoint:
        """Return the adjoint of the step's gradient; carry the buffers' to before the step."""
        if dynamics.momentum == 0:
            return _GradientAdjoint(self._u, dynamics.lr)
        # The buffer enters the update with a minus sign, so its adjoint has the opposite sign.
        buffer = dynamics.buffer_coefficient * dynamics.lr * self._u
        if dynamics.owner in self._buffers:
            buffer += self._buffers[dynamics.owner]
        self._buffers[dynamics.owner] = dynamics.momentum * buffer
        if not dynamics.nesterov:
            return _GradientAdjoint(buffer, dynamics.gradient_share)
        gradient = dynamics.nesterov * dynamics.lr * self._u
        return _GradientAdjoint(gradient.add_(buffer, alpha=dynamics.gradient_share), 1.0)

    def step_back_(
        self,
        dynamics: Dynamics,
        adjoint: _GradientAdjoint,
        hessian: LimitedCurvature,
        products: Float[Tensor, "m n_query"],
    ) -> None:
        """Carry the adjoint of the weights to before the step."""
        decay_factor = 1 - dynamics.lr * dynamics.decoupled_decay
        if dynamics.coupled_decay:
            # Must come before the scaling: the adjoint may hold the very vectors that it changes.
            alpha = dynamics.coupled_decay * adjoint.scale / decay_factor
            self._u.sub_(adjoint.vectors, alpha=alpha)
        if dynamics.decoupled_decay:
            self._u *= decay_factor
        hessian.subtract_product_(self._u, products)
