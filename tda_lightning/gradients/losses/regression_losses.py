"""Losses of numbers on the autograd graph: squared errors, and Huber's loss."""

from __future__ import annotations

from typing import Any

import torch
from torch import Generator, Tensor

from tda_lightning.gradients.losses.loss_nodes import ReducedLoss, Terms, uniform


class SquaredLoss(ReducedLoss):
    """Squared error: the negative log-likelihood of a normal distribution.

    It is symmetric, so the outputs may be its target: ``mse_loss(labels, outputs)``.
    """

    name = "squared error"

    def __init__(self, node: Any) -> None:
        super().__init__(node)
        self.position = int(node.next_functions[0][0] is None)

    def sample(self, generator: Generator) -> Tensor:
        """Sample signs: any residual of the right variance is valid; signs have the least noise."""
        outputs = self.saved("self").detach()
        signs = torch.where(uniform(outputs, generator) < 0.5, -1.0, 1.0).to(outputs)
        return signs * self._hessian(outputs).sqrt()

    def summarize(self, grad: Tensor, weights: Tensor) -> Terms:
        """Return the second derivative of each term, and its squared first derivative."""
        hessian = self._hessian(self.saved("self").detach()).expand_as(grad)
        return Terms.of_one_output(hessian, (grad / weights).square())

    def losses(self, value_grad: Tensor, weights: Tensor, square: Tensor) -> Tensor:
        """Return the squared residual of each term."""
        return square / 4

    def _hessian(self, outputs: Tensor) -> Tensor:
        return torch.full_like(outputs, 2.0)


class SquarePower(SquaredLoss):
    """Squared error, computed as the square of a difference: ``(a - b) ** 2``."""

    def weights(self, grad: Tensor) -> Tensor:
        """Return the gradient: the reduction comes after this node.

        A square that lowers the loss is none, as the variance in a normal distribution's density.
        """
        return grad.clamp_min(0)


class HuberLoss(SquaredLoss):
    """Huber's loss, also as smooth L1: curved only where the residual is small."""

    name = "Huber's loss"

    def _hessian(self, outputs: Tensor) -> Tensor:
        inside: Tensor = self._distance() < self._width
        return inside.to(outputs) * self._slope / self._width

    def losses(self, value_grad: Tensor, weights: Tensor, square: Tensor) -> Tensor:
        """Return the value of each term, from its residual."""
        # The slope is linear up to the width, and constant beyond it.
        inside = self._distance().clamp_max(self._width)
        return self._slope * (self._distance() - inside + inside.square() / (2 * self._width))

    def _distance(self) -> Tensor:
        distance: Tensor = (self.saved("self").detach() - self.saved("target")).abs()
        return distance

    @property
    def _width(self) -> float:
        delta: float | None = getattr(self.node, "_saved_delta", None)
        return self.node._saved_beta if delta is None else delta

    @property
    def _slope(self) -> float:
        delta: float | None = getattr(self.node, "_saved_delta", None)
        return 1.0 if delta is None else delta
