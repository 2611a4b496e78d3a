"""Loss functions on the autograd graph: weights of terms, curvature, and sampled labels."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Generator, Tensor
from torch.autograd.graph import GradientEdge

TraceAndSquare = tuple[Tensor, Tensor]
# Vocabularies are large: labels are drawn for so many probabilities at a time.
_MAX_PROBABILITIES = 2**22


class LossNode(ABC):
    """The autograd node at which a loss function turns outputs into terms.

    Args:
        node: The node. Its first input is the model's outputs.

    Attributes:
        name: Name of the loss.
    """

    name = "cross-entropy"

    def __init__(self, node: Any) -> None:
        self.node = node

    @property
    def value(self) -> GradientEdge:
        """Graph edge of the node's result."""
        return GradientEdge(self.node, 0)

    @property
    def outputs(self) -> GradientEdge:
        """Graph edge of the model's outputs."""
        return GradientEdge(*self.node.next_functions[0])

    @abstractmethod
    def weights(self, grad: Tensor) -> Tensor:
        """Return each term's weight in the loss, broadcastable to the shape of the outputs.

        Args:
            grad: Gradient of the loss with respect to the node's result.
        """

    @abstractmethod
    def sample(self, generator: Generator) -> Tensor:
        """Sample a label per term; return the unweighted terms' gradient at the outputs.

        Args:
            generator: Generator of the labels.
        """

    def summarize(self, grad: Tensor, weights: Tensor) -> TraceAndSquare:
        """Return the trace of each term's Hessian, and its squared gradient for the given label.

        Args:
            grad: Gradient of the loss with respect to the outputs.
            weights: Weight of each term in the loss, not zero.
        """
        residuals = (self._weighted_residuals(grad) / weights).clamp(0, 1)
        return residuals * (1 - residuals), residuals.square()

    def _weighted_residuals(self, grad: Tensor) -> Tensor:
        """Return each term's weight times 1 - p, where p is the probability of the label."""
        return grad.abs()


class SoftmaxLoss(LossNode):
    """Any function linear in a log-softmax: cross-entropy, also with weights or smoothing."""

    @property
    def _axis(self) -> int:
        axis: int = self.node._saved_dim  # Negative axes are returned as unsigned integers.
        return axis - 2**64 if axis >= 2**63 else axis

    def weights(self, grad: Tensor) -> Tensor:
        """Return the negative sum of the coefficients of the log-probabilities."""
        return -grad.sum(dim=self._axis, keepdim=True)

    def sample(self, generator: Generator) -> Tensor:
        """Sample classes by inverting the cumulative distribution."""
        gradient: Tensor = self.node._saved_result.detach().exp()
        rows = gradient.movedim(self._axis, -1)
        size = max(1, _MAX_PROBABILITIES * len(rows) // max(rows.numel(), 1))
        for part in rows.split(size) if rows.ndim > 1 else (rows,):
            _subtract_drawn_(part, generator)
        return gradient

    def _weighted_residuals(self, grad: Tensor) -> Tensor:
        # A norm needs no copy of the gradient, which is large for large vocabularies.
        total: Tensor = torch.linalg.vector_norm(grad, ord=1, dim=self._axis, keepdim=True)
        return 0.5 * total


class ReducedLoss(LossNode):
    """A torch loss function that reduces its terms itself."""

    def weights(self, grad: Tensor) -> Tensor:
        """Return the weight that the reduction and the loss function's arguments give each term."""
        outputs = self.node._saved_self
        share = grad / outputs.numel() if self.node._saved_reduction == 1 else grad
        weights: Tensor = (share * self._weight_arguments()).expand_as(outputs)
        return weights

    def _weight_arguments(self) -> Tensor:
        weight: Tensor | None = getattr(self.node, "_saved_weight", None)
        return torch.ones((), device=self.node._saved_self.device) if weight is None else weight


class BernoulliLogitsLoss(ReducedLoss):
    """Binary cross-entropy of logits."""

    def _weight_arguments(self) -> Tensor:
        pos_weight = self.node._saved_pos_weight
        weights = super()._weight_arguments()
        target = self.node._saved_target
        return weights if pos_weight is None else weights * (1 + (pos_weight - 1) * target)

    def sample(self, generator: Generator) -> Tensor:
        """Sample binary labels."""
        p: Tensor = self.node._saved_self.detach().sigmoid()
        return p - _sampled_bits(p, generator)


class BernoulliLoss(ReducedLoss):
    """Binary cross-entropy of probabilities."""

    def sample(self, generator: Generator) -> Tensor:
        """Sample binary labels."""
        p = self._probabilities()
        return (p - _sampled_bits(p, generator)) / (p * (1 - p))

    def _weighted_residuals(self, grad: Tensor) -> Tensor:
        p = self._probabilities()
        return (grad * p * (1 - p)).abs()

    def _probabilities(self) -> Tensor:
        p: Tensor = self.node._saved_self.detach().clamp(1e-6, 1 - 1e-6)
        return p


class SquaredLoss(ReducedLoss):
    """Squared error: the negative log-likelihood of a normal distribution."""

    name = "squared error"

    def sample(self, generator: Generator) -> Tensor:
        """Sample signs: any residual of the right variance is valid; signs have the least noise."""
        outputs = self.node._saved_self.detach()
        signs = torch.where(_uniform(outputs, generator) < 0.5, -1.0, 1.0).to(outputs)
        return signs * self._hessian(outputs).sqrt()

    def summarize(self, grad: Tensor, weights: Tensor) -> TraceAndSquare:
        """Return the second derivative of each term, and its squared first derivative."""
        hessian = self._hessian(self.node._saved_self.detach()).expand_as(grad)
        return hessian, (grad / weights).square()

    def _hessian(self, outputs: Tensor) -> Tensor:
        return torch.full_like(outputs, 2.0)


class SquarePower(SquaredLoss):
    """Squared error, computed as the square of a difference: ``(a - b) ** 2``."""

    def weights(self, grad: Tensor) -> Tensor:
        """Return the gradient: the reduction comes after this node."""
        return grad


class HuberLoss(SquaredLoss):
    """Huber's loss, also as smooth L1: curved only where the residual is small."""

    name = "Huber's loss"

    def _hessian(self, outputs: Tensor) -> Tensor:
        delta = getattr(self.node, "_saved_delta", None)
        width = delta if delta is not None else self.node._saved_beta
        inside: Tensor = (outputs - self.node._saved_target).abs() < width
        return inside.to(outputs) * (1.0 if delta is not None else 1 / width)


def _subtract_drawn_(probabilities: Tensor, generator: Generator) -> None:
    """Draw a class along the last axis, and subtract 1 from its probability."""
    cumulative = probabilities.cumsum(dim=-1)
    total = cumulative[..., -1:]
    drawn = (cumulative <= _uniform(total, generator) * total).sum(dim=-1, keepdim=True)
    drawn = drawn.clamp_max(cumulative.shape[-1] - 1)
    probabilities.scatter_add_(-1, drawn, -torch.ones_like(total))


def _sampled_bits(p: Tensor, generator: Generator) -> Tensor:
    return (_uniform(p, generator) < p).to(p)


def _uniform(like: Tensor, generator: Generator) -> Tensor:
    return torch.rand(like.shape, generator=generator, device=like.device, dtype=like.dtype)


class LossSummary:
    """Hook the loss functions of a batch to summarize each sample's loss in the backward pass.

    Args:
        nodes: The loss functions of a batch, before its backward pass.
        n: Number of samples in the batch.
        is_paused: Returns whether the current backward pass is not the batch's.
    """

    def __init__(
        self, nodes: Sequence[LossNode], n: int, is_paused: Callable[[], bool] = lambda: False
    ) -> None:
        self._is_paused = is_paused
        self._n = n
        self._names = sorted({node.name for node in nodes})
        # Sums over each sample's terms: weights, squared weights, traces, squared gradients.
        self._sums: list[Tensor] = []
        for node in nodes:
            node.node.register_hook(self._hook(node))

    def _hook(self, node: LossNode) -> Callable[[Any, Any], None]:
        waiting = [node]

        def hook(inputs: tuple[Tensor | None, ...], outputs: tuple[Tensor | None, ...]) -> None:
            if (
                waiting
                and not self._is_paused()
                and inputs[0] is not None
                and outputs[0] is not None
            ):
                with torch.no_grad():
                    self._add(waiting.pop(), outputs[0], inputs[0])

        return hook

    def _add(self, node: LossNode, value_grad: Tensor, outputs_grad: Tensor) -> None:
        weights = node.weights(value_grad)
        if weights.numel() % self._n:
            return
        trace, square = node.summarize(outputs_grad, torch.where(weights == 0, 1, weights))
        squares = weights.square()
        parts = [weights, squares, weights * trace, squares * square]
        # A sample's terms are contiguous, even if the sample axis has been flattened.
        sums = [part.reshape(self._n, -1).sum(dim=1) for part in parts]
        self._sums = [a + b for a, b in zip(self._sums, sums, strict=True)] if self._sums else sums

    def loss(self) -> str:
        """Return the name of the loss, empty if it is not supported."""
        return " and ".join(self._names)

    def terms(self) -> Float[Tensor, " n"] | None:
        """Return each sample's effective number of terms, ``(sum w)**2 / sum w**2``, if known."""
        if not self._sums:
            return None
        total, squares, _, _ = self._sums
        return torch.where(squares > 0, total.square() / squares, 1)

    def spread(self) -> Float[Tensor, " n"] | None:
        """Return the trace of each sample's Hessian over its squared gradient, if known."""
        if not self._sums:
            return None
        _, _, trace, square = self._sums
        return torch.where(square > 0, trace / square, 0)
