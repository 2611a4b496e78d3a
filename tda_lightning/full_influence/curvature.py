r"""Kinds of curvature of a model's own objective, as linear operators on parameter space.

With the training step cut into a model and a loss, :math:`L(\theta) = c(f(\theta))`, and
:math:`J` the Jacobian of :math:`f`,

.. math:: H = \nabla^2 L, \qquad G = J^\top \, \nabla^2 c \, J

:math:`H` is the Hessian. :math:`G`, the Gauss-Newton matrix, is positive semi-definite where the
loss is convex in the outputs, and equal to it where the model is linear; see Martens (2020), "New
Insights and Perspectives on the Natural Gradient Method".
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from tda_lightning.full_influence.model_loss_split import ModelLossSplit
from tda_lightning.full_influence.objective import Objective
from tda_lightning.full_influence.second_derivatives import require_second_derivative, whole_loss

if TYPE_CHECKING:
    from tda_lightning.full_influence.curvlinops_bindings import Operator


class ModelCurvature(ABC):
    """A kind of curvature."""

    @abstractmethod
    def operator(self, objective: Objective) -> Operator:
        """Return the curvature of an objective, as a linear operator.

        Raises:
            ValueError: If the training step does not allow it.
        """

    def below_zero(self, operator: Operator) -> float:
        """Return how far its eigenvalues reach below zero: by default, they do not.

        Args:
            operator: What :meth:`operator` returned, or a mean of such.
        """
        return 0.0


@dataclass(frozen=True)
class GaussNewton(ModelCurvature):
    """The Gauss-Newton matrix.

    Where the model ends and the loss begins is told from the training step itself: from the calls
    of torch's loss functions in it.

    Attributes:
        outputs: Says it instead: returns the outputs from module and batch.
        loss: Returns the loss of a batch from outputs and batch. Goes with ``outputs``.
    """

    outputs: Callable[[nn.Module, Any], Tensor] | None = field(default=None, repr=False)
    loss: Callable[[Tensor, Any], Tensor] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        """Raise unless there are two functions, or none."""
        if (self.outputs is None) != (self.loss is None):
            raise ValueError(
                "`GaussNewton` was given one of `outputs` and `loss`; expected both, or neither. "
                "Pass the other as well."
            )
        for name, given in (("outputs", self.outputs), ("loss", self.loss)):
            if given is not None:
                _require_function(name, given)

    def operator(self, objective: Objective) -> Operator:
        """Return the matrix of the mean loss, as a linear operator."""
        from tda_lightning.full_influence.curvlinops_bindings import gauss_newton
        from tda_lightning.full_influence.operators import checked

        if self.outputs is None or self.loss is None:
            halves = ModelLossSplit(objective)
            return checked(gauss_newton(objective, halves.outputs, halves.loss), objective)
        model, batches, read, judge = objective.model, objective.batches, self.outputs, self.loss
        found = gauss_newton(
            objective,
            lambda number: read(model, batches[number]),
            lambda outputs, number: judge(outputs, batches[number]).reshape(()),
        )
        return checked(found, objective)


@dataclass(frozen=True)
class Hessian(ModelCurvature):
    """The Hessian of the whole training step.

    It has negative eigenvalues wherever the training has not ended in a minimum. The damping must
    be larger than these: where none is given, it is by as much larger as it would be without them.
    One product with it is checked against two backward passes.
    """

    def operator(self, objective: Objective) -> Operator:
        """Return the matrix of the mean loss, as a linear operator."""
        from tda_lightning.full_influence.curvlinops_bindings import hessian
        from tda_lightning.full_influence.operators import checked

        found = checked(hessian(objective, lambda n: whole_loss(objective, n)), objective)
        require_second_derivative(objective, found)
        return found

    def below_zero(self, operator: Operator) -> float:
        """Return how far its eigenvalues reach below zero, for some tens of products."""
        from tda_lightning.full_influence.curvlinops_bindings import extremes

        return -extremes(operator)[0]


def _require_function(name: str, given: object) -> None:
    if not callable(given):
        raise ValueError(
            f"`{name}` is {given!r}; expected a function, such as `outputs=lambda module, batch: "
            "module(batch[0])` with `loss=lambda outputs, batch: cross_entropy(outputs, batch[1])`."
        )
