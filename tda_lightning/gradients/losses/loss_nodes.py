"""Kinds of loss functions: their terms' weights, their curvature, and labels drawn from them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Generator, Tensor
from torch.autograd.graph import GradientEdge

Summary = tuple[Tensor, Tensor]


class LossNode(ABC):
    """The node of a graph at which a loss function turns outputs into terms.

    Args:
        node: The node. The gradient of its first input is that of the outputs.

    Attributes:
        name: What the loss is called.
    """

    name = "cross-entropy"

    def __init__(self, node: Any) -> None:
        self.node = node

    @property
    def value(self) -> GradientEdge:
        """What the node gave, as a place on the graph."""
        return GradientEdge(self.node, 0)

    @property
    def outputs(self) -> GradientEdge:
        """What the model said, as a place on the graph."""
        return GradientEdge(*self.node.next_functions[0])

    @abstractmethod
    def weights(self, grad: Tensor) -> Tensor:
        """Return the weight of every term in the loss, of the outputs' shape or broadcasting to it.

        Args:
            grad: Gradient of the loss with respect to what the node gave.
        """

    @abstractmethod
    def sample(self, generator: Generator) -> Tensor:
        """Draw a label for each term; return the unweighted terms' gradient for the outputs."""

    def summarize(self, grad: Tensor, weights: Tensor) -> Summary:
        """Return the trace of each term's Hessian, and its squared gradient, for the label given.

        Args:
            grad: Gradient of the loss with respect to the outputs.
            weights: Weight of every term in the loss; none is zero.
        """
        misses = (self._misses(grad) / weights).clamp(0, 1)
        return misses * (1 - misses), misses.square()

    def _misses(self, grad: Tensor) -> Tensor:
        """Return the weight times 1 - p of the label: the size of the gradient of a coin's loss."""
        return grad.abs()


class SoftmaxLoss(LossNode):
    """Anything linear in a log-softmax: cross-entropy, with or without weights or smoothing."""

    @property
    def _axis(self) -> int:
        axis: int = self.node._saved_dim  # Negative ones come as unsigned numbers.
        return axis - 2**64 if axis >= 2**63 else axis

    def weights(self, grad: Tensor) -> Tensor:
        """Return minus the sum of the coefficients of the log-probabilities."""
        return -grad.sum(dim=self._axis, keepdim=True)

    def sample(self, generator: Generator) -> Tensor:
        """Draw classes, by inversion of the cumulative distribution."""
        axis = self._axis
        probabilities = self.node._saved_result.detach().exp()
        cumulative = probabilities.cumsum(dim=axis)
        total = cumulative.narrow(axis, cumulative.shape[axis] - 1, 1)
        drawn = (cumulative <= _uniform(total, generator) * total).sum(dim=axis, keepdim=True)
        drawn = drawn.clamp_max(cumulative.shape[axis] - 1)
        gradient: Tensor = probabilities.scatter_add_(axis, drawn, -torch.ones_like(total))
        return gradient

    def _misses(self, grad: Tensor) -> Tensor:
        # A norm, since the absolute values of a large vocabulary are not to be written down.
        total: Tensor = torch.linalg.vector_norm(grad, ord=1, dim=self._axis, keepdim=True)
        return 0.5 * total


class ReducedLoss(LossNode):
    """A loss function of torch's that reduces its terms itself."""

    def weights(self, grad: Tensor) -> Tensor:
        """Return the share that the reduction gives to each term."""
        outputs = self.node._saved_self
        share = grad / outputs.numel() if self.node._saved_reduction == 1 else grad
        weights: Tensor = (share * self._given_weights()).expand_as(outputs)
        return weights

    def _given_weights(self) -> Tensor:
        weight: Tensor | None = getattr(self.node, "_saved_weight", None)
        return torch.ones((), device=self.node._saved_self.device) if weight is None else weight


class CoinLogitsLoss(ReducedLoss):
    """Binary cross-entropy of logits."""

    def _given_weights(self) -> Tensor:
        for_ones = self.node._saved_pos_weight
        weights = super()._given_weights()
        target = self.node._saved_target
        return weights if for_ones is None else weights * (1 + (for_ones - 1) * target)

    def sample(self, generator: Generator) -> Tensor:
        """Toss the coins."""
        chance: Tensor = self.node._saved_self.detach().sigmoid()
        return chance - (_uniform(chance, generator) < chance).to(chance)


class BernoulliLoss(ReducedLoss):
    """Binary cross-entropy of probabilities."""

    def sample(self, generator: Generator) -> Tensor:
        """Toss the coins."""
        chance = self._chance()
        tossed = (_uniform(chance, generator) < chance).to(chance)
        return (chance - tossed) / (chance * (1 - chance))

    def _misses(self, grad: Tensor) -> Tensor:
        chance = self._chance()
        return (grad * chance * (1 - chance)).abs()

    def _chance(self) -> Tensor:
        chance: Tensor = self.node._saved_self.detach().clamp(1e-6, 1 - 1e-6)
        return chance


class SquaredLoss(ReducedLoss):
    """Squared error: a normal distribution of the target."""

    name = "squared error"

    def sample(self, generator: Generator) -> Tensor:
        """Draw signs: any residual of the right variance will do, and these have least noise."""
        outputs = self.node._saved_self.detach()
        signs = torch.where(_uniform(outputs, generator) < 0.5, -1.0, 1.0).to(outputs)
        return signs * self._hessian(outputs).sqrt()

    def summarize(self, grad: Tensor, weights: Tensor) -> Summary:
        """Return the second derivative and the squared first."""
        hessian = self._hessian(self.node._saved_self.detach()).expand_as(grad)
        return hessian, (grad / weights).square()

    def _hessian(self, outputs: Tensor) -> Tensor:
        return torch.full_like(outputs, 2.0)


class SquarePower(SquaredLoss):
    """Squared error, written as a power of two of a difference."""

    def weights(self, grad: Tensor) -> Tensor:
        """Return the gradient itself: whatever reduces the terms comes after."""
        return grad


class HuberLoss(SquaredLoss):
    """Huber's loss, and its smooth-L1 form: curved only where the residual is small."""

    name = "Huber's loss"

    def _hessian(self, outputs: Tensor) -> Tensor:
        delta = getattr(self.node, "_saved_delta", None)
        width = delta if delta is not None else self.node._saved_beta
        inside: Tensor = (outputs - self.node._saved_target).abs() < width
        return inside.to(outputs) * (1.0 if delta is not None else 1 / width)


def _uniform(like: Tensor, generator: Generator) -> Tensor:
    return torch.rand(like.shape, generator=generator, device=like.device, dtype=like.dtype)
