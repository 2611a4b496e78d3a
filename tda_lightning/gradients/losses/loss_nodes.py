"""Loss functions on the autograd graph: weights of terms, values, curvature, sampled labels."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor
from torch.autograd.graph import GradientEdge

from tda_lightning.gradients.nodes.saved_values import saved_value

# Vocabularies are large: at most this many probabilities are computed again at a time.
_MAX_PROBABILITIES = 2**22


# Probabilities minus labels sum to at most 1 on either side; the rest is rounding, in any format.
_LARGEST_RESIDUAL = 1.1


class Terms(NamedTuple):
    """Facts of each term, unweighted; NaN where the loss is another function of the outputs.

    Attributes:
        trace: Second derivative with respect to the output of the label.
        square: Squared gradient there, for the given label.
        full_trace: Trace of the Hessian with respect to all outputs.
        full_square: Squared norm of the gradient there, for the given label.
    """

    trace: Tensor
    square: Tensor
    full_trace: Tensor
    full_square: Tensor

    @classmethod
    def of_one_output(cls, trace: Tensor, square: Tensor) -> Terms:
        """Return the facts of terms with one output each."""
        return cls(trace, square, trace, square)


class Predictions(NamedTuple):
    """How well each term's label was predicted.

    Attributes:
        loss: Value of the term, without rounding for badly predicted labels.
        error: Norm of the difference between predicted probabilities and label.
        margin: Logit of the label minus the highest other logit: positive if it is predicted.
    """

    loss: Tensor
    error: Tensor
    margin: Tensor


class LossNode(ABC):
    """The autograd node at which a loss function turns outputs into terms.

    Args:
        node: The node.

    Attributes:
        name: Name of the loss.
        position: Position of the model's outputs among the node's inputs.
    """

    name = "cross-entropy"

    def __init__(self, node: Any) -> None:
        self.node = node
        self.position = 0

    def saved(self, name: str) -> Any:
        """Return a value that the node saved in the forward pass."""
        return saved_value(self.node, name)

    @property
    def value(self) -> GradientEdge:
        """Graph edge of the node's result."""
        return GradientEdge(self.node, 0)

    @property
    def outputs(self) -> GradientEdge:
        """Graph edge of the model's outputs."""
        return GradientEdge(*self.node.next_functions[self.position])

    @property
    def class_axis(self) -> int | None:
        """Axis of the outputs that holds the classes of one term, if there is one."""
        return None

    def n_terms(self, shape: Sequence[int]) -> int:
        """Return the number of terms of outputs of this shape."""
        return prod(size for axis, size in enumerate(shape) if axis != self.class_axis)

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

    def summarize(self, grad: Tensor, weights: Tensor) -> Terms:
        """Return facts of each term.

        Args:
            grad: Gradient of the loss with respect to the outputs.
            weights: Weight of each term in the loss, not zero.
        """
        residuals = self._weighted_residuals(grad) / weights
        # Otherwise the loss is not linear in the log-probabilities, such as that of CTC.
        is_linear = (residuals >= 0) & (residuals <= _LARGEST_RESIDUAL)
        residuals = torch.where(is_linear, residuals.clamp(0, 1), torch.nan)
        return Terms.of_one_output(residuals * (1 - residuals), residuals.square())

    def losses(self, value_grad: Tensor, weights: Tensor, square: Tensor) -> Tensor:
        """Return the value of each term.

        Args:
            value_grad: Gradient of the loss with respect to the node's result.
            weights: Weight of each term in the loss, not zero.
            square: Squared gradient of each term for the given label.
        """
        residuals = square.sqrt().clamp_max(1 - torch.finfo(square.dtype).eps)
        return -torch.log1p(-residuals)

    def predictions(self, value_grad: Tensor, grad: Tensor, weights: Tensor) -> Predictions | None:
        """Return how well each label was predicted, if labels are classes.

        Args:
            value_grad: Gradient of the loss with respect to the node's result.
            grad: Gradient of the loss with respect to the outputs.
            weights: Weight of each term in the loss, not zero.
        """
        return None

    def _weighted_residuals(self, grad: Tensor) -> Tensor:
        """Return each term's weight times 1 - p, where p is the probability of the label."""
        return grad.abs()


class SoftmaxLoss(LossNode):
    """Any function linear in a log-softmax: cross-entropy, also with weights or smoothing."""

    @property
    def axis(self) -> int:
        """Axis of the classes."""
        axis: int = self.node._saved_dim  # Negative axes are returned as unsigned integers.
        return axis - 2**64 if axis >= 2**63 else axis

    @property
    def class_axis(self) -> int:
        """Axis of the classes, counted from the first."""
        return self.axis % max(len(self.node._input_metadata[0].shape), 1)

    def weights(self, grad: Tensor) -> Tensor:
        """Return the negative sum of the coefficients of the log-probabilities."""
        return -grad.sum(dim=self.axis, keepdim=True)

    def sample(self, generator: Generator) -> Tensor:
        """Sample classes by inverting the cumulative distribution."""
        gradient: Tensor = self.saved("result").detach().exp()
        rows = gradient.movedim(self.axis, -1)
        size = max(1, _MAX_PROBABILITIES * len(rows) // max(rows.numel(), 1))
        for part in torch.split(rows, size) if rows.ndim > 1 else (rows,):
            _subtract_drawn_(part, generator)
        return gradient

    def summarize(self, grad: Tensor, weights: Tensor) -> Terms:
        """Return facts of each term, for its label alone and for all classes."""
        of_label = super().summarize(grad, weights)
        norms = torch.linalg.vector_norm(grad, dim=self.axis, keepdim=True)
        full_square = torch.where(of_label.square.isnan(), torch.nan, (norms / weights).square())
        full_trace = self._full_trace(of_label, full_square)
        if grad.shape[self.axis] == 2:  # The gradients of both classes are opposite.
            return Terms.of_one_output(full_trace / 2, full_square / 2)
        return of_label._replace(full_trace=full_trace, full_square=full_square)

    def predictions(self, value_grad: Tensor, grad: Tensor, weights: Tensor) -> Predictions:
        """Return the loss, the norm of the error over all classes, and the margin."""
        axis, log_probabilities = self.axis, self.saved("result").detach()
        coefficients = value_grad / weights
        labels = coefficients.argmin(dim=axis, keepdim=True)
        others = log_probabilities.scatter(axis, labels, -torch.inf)
        return Predictions(
            self._exact_losses(coefficients),
            torch.linalg.vector_norm(grad, dim=axis, keepdim=True) / weights.abs(),
            log_probabilities.gather(axis, labels) - others.amax(dim=axis, keepdim=True),
        )

    def losses(self, value_grad: Tensor, weights: Tensor, square: Tensor) -> Tensor:
        """Return the value of each term; of large vocabularies, exactly for labels of one class."""
        if value_grad.numel() <= _MAX_PROBABILITIES:
            return self._exact_losses(value_grad / weights)
        return super().losses(value_grad, weights, square)

    def _exact_losses(self, coefficients: Tensor) -> Tensor:
        # Forbidden classes have a log-probability of minus infinity, and no coefficient.
        parts = torch.where(coefficients == 0, 0, coefficients * self.saved("result").detach())
        return parts.sum(dim=self.axis, keepdim=True)

    def _full_trace(self, of_label: Terms, full_square: Tensor) -> Tensor:
        """Return the sum over classes of p * (1 - p)."""
        log_p: Tensor = self.saved("result").detach()
        if log_p.numel() <= _MAX_PROBABILITIES:
            return -(log_p.exp() * log_p.expm1()).sum(dim=self.axis, keepdim=True)
        # Without copies of all probabilities, from |p - e|^2: exact for a label of one class, e.
        return (2 * of_label.square.sqrt() - full_square).clamp_min(0)

    def _weighted_residuals(self, grad: Tensor) -> Tensor:
        # A norm needs no copy of the gradient, which is large for large vocabularies.
        total: Tensor = torch.linalg.vector_norm(grad, ord=1, dim=self.axis, keepdim=True)
        return 0.5 * total


class ReducedLoss(LossNode):
    """A torch loss function that reduces its terms itself."""

    def weights(self, grad: Tensor) -> Tensor:
        """Return the weight that the reduction and the loss function's arguments give each term."""
        outputs = self.saved("self")
        share = grad / outputs.numel() if self.node._saved_reduction == 1 else grad
        weights: Tensor = (share * self._weight_arguments()).expand_as(outputs)
        return weights

    def _weight_arguments(self) -> Tensor:
        weight: Tensor | None = (
            self.saved("weight") if hasattr(self.node, "_saved_weight") else None
        )
        return torch.ones((), device=self.saved("self").device) if weight is None else weight


def _subtract_drawn_(probabilities: Tensor, generator: Generator) -> None:
    """Draw a class along the last axis, and subtract 1 from its probability."""
    cumulative = probabilities.cumsum(dim=-1)
    total = cumulative[..., -1:]
    drawn = (cumulative <= uniform(total, generator) * total).sum(dim=-1, keepdim=True)
    drawn = drawn.clamp_max(cumulative.shape[-1] - 1)
    probabilities.scatter_add_(-1, drawn, -torch.ones_like(total))


def uniform(like: Tensor, generator: Generator) -> Tensor:
    """Return uniform numbers of the shape and type of a tensor."""
    return torch.rand(like.shape, generator=generator, device=like.device, dtype=like.dtype)
