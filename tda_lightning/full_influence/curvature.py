r"""Curvatures of the training objective: Gauss-Newton matrix and Hessian, as linear operators.

With the training step split into a model and a loss, :math:`L(\theta) = c(f(\theta))`, and
:math:`J` the Jacobian of :math:`f`,

.. math:: H = \nabla^2 L, \qquad G = J^\top \, \nabla^2 c \, J

:math:`H` is the Hessian, :math:`G` the Gauss-Newton matrix. :math:`G` is positive semi-definite if
the loss is convex in the outputs, and equals :math:`H` if the model is linear; see Martens (2020),
"New Insights and Perspectives on the Natural Gradient Method".
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor

from tda_lightning.full_influence.model_loss_split import ModelLossSplit
from tda_lightning.full_influence.objective import Objective
from tda_lightning.full_influence.operators import Operator, checked
from tda_lightning.full_influence.second_derivatives import (
    gauss_newton_products,
    hessian_products,
)
from tda_lightning.passes.outputs import Outputs


class ModelCurvature(ABC):
    """A kind of curvature."""

    @abstractmethod
    def operator(self, objective: Objective) -> Operator:
        """Return the curvature of an objective, as a linear operator.

        Raises:
            ValueError: If the curvature of the training step cannot be computed.
        """

    def below_zero(self, operator: Operator) -> float:
        """Return how far the eigenvalues of :meth:`operator` extend below zero; by default 0."""
        return 0.0


@dataclass(frozen=True)
class GaussNewton(ModelCurvature):
    """The Gauss-Newton matrix.

    Where the model ends and the loss begins is inferred from the training step itself: from its
    calls of torch's loss functions. ``outputs`` and ``loss`` specify the split instead.

    Attributes:
        outputs: Function from (module, batch) to the outputs.
        loss: Function from (outputs, batch) to the loss of the batch. Required with ``outputs``.
    """

    outputs: Outputs | None = field(default=None, repr=False)
    loss: Callable[[Tensor, Any], Tensor] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if (self.outputs is None) != (self.loss is None):
            raise ValueError(
                "`GaussNewton` was given one of `outputs` and `loss`; expected both, or neither. "
                "Pass the other as well."
            )
        for name, function in (("outputs", self.outputs), ("loss", self.loss)):
            if function is not None:
                _require_function(name, function)

    def operator(self, objective: Objective) -> Operator:
        """Return the Gauss-Newton matrix of the mean loss, as a linear operator."""
        if self.outputs is None or self.loss is None:
            split = ModelLossSplit(objective)
            by_step = partial(gauss_newton_products, objective, split.outputs, split.loss)
            return checked(objective, by_step)
        model, batches = objective.model, objective.batches
        outputs_of, loss_of = self.outputs, self.loss
        by_user = partial(
            gauss_newton_products,
            objective,
            lambda number: outputs_of(model, batches[number]),
            lambda outputs, number: loss_of(outputs, batches[number]).reshape(()),
        )
        return checked(objective, by_user)


@dataclass(frozen=True)
class Hessian(ModelCurvature):
    """The Hessian of the training step.

    It has negative eigenvalues wherever the training has not ended in a minimum. Damping must
    exceed their magnitude, so the default damping is increased by it.
    """

    def operator(self, objective: Objective) -> Operator:
        """Return the Hessian of the mean loss, as a linear operator."""
        return checked(objective, partial(hessian_products, objective))

    def below_zero(self, operator: Operator) -> float:
        """Return how far the eigenvalues extend below zero, using some tens of products."""
        from tda_lightning.full_influence.eigenvalues import extremes

        return -extremes(operator)[0]


def _require_function(name: str, function: object) -> None:
    if not callable(function):
        raise ValueError(
            f"`{name}` is {function!r}; expected a function, such as `outputs=lambda module, "
            "batch: module(batch[0])` with "
            "`loss=lambda outputs, batch: cross_entropy(outputs, batch[1])`."
        )
