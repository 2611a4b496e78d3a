r"""Losses: what a model's loss is made of, how curved it is, and labels of the model's own.

A loss is a weighted sum of terms (samples, tokens, outputs). Where a term is the negative
log-likelihood of a label under a distribution that the model predicts, labels :math:`\hat y` drawn
from that distribution give gradients :math:`\hat g` at the model's outputs with
:math:`E\,\hat g \hat g^\top = A`, the Hessian of the term there (Martens 2020, "New Insights and
Perspectives on the Natural Gradient Method", section 5). Pulled back through the model they are
rows of the Gauss-Newton matrix.

The terms are found on the graph of the loss, whatever function made it: cross-entropy is anything
that is linear in a log-softmax. Nothing is watched while the model runs, no random number of the
user's is drawn, and the graph is kept.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Generator, Tensor
from torch.autograd.graph import GradientEdge

Summary = tuple[Tensor, Tensor]
# A loss function stands near the root of the graph; the model behind it may be large.
_NODES_TO_SEARCH = 500


class LossNode(ABC):
    """The node of a graph at which a loss function turns outputs into terms.

    Args:
        node: The node. The gradient of its first input is that of the outputs.
    """

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

    def summarize(self, grad: Tensor) -> Summary:
        """Return the trace of each term's Hessian, and its squared gradient, for the label given.

        Args:
            grad: Gradient of the unweighted terms with respect to the outputs.
        """
        misses = self._misses(grad).clamp(0, 1)
        return misses * (1 - misses), misses.square()

    def _misses(self, grad: Tensor) -> Tensor:
        """Return 1 - p of the label: the size of the gradient of a coin's loss."""
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
        return 0.5 * grad.abs().sum(dim=self._axis, keepdim=True)


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


class CoinLoss(ReducedLoss):
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

    def sample(self, generator: Generator) -> Tensor:
        """Draw signs: any residual of the right variance will do, and these have least noise."""
        outputs = self.node._saved_self.detach()
        signs = torch.where(_uniform(outputs, generator) < 0.5, -1.0, 1.0).to(outputs)
        return signs * self._hessian(outputs).sqrt()

    def summarize(self, grad: Tensor) -> Summary:
        """Return the second derivative and the squared first."""
        return self._hessian(self.node._saved_self.detach()).expand_as(grad), grad.square()

    def _hessian(self, outputs: Tensor) -> Tensor:
        return torch.full_like(outputs, 2.0)


class SquarePower(SquaredLoss):
    """Squared error, written as a power of two of a difference."""

    def weights(self, grad: Tensor) -> Tensor:
        """Return the gradient itself: whatever reduces the terms comes after."""
        return grad


class HuberLoss(SquaredLoss):
    """Huber's loss, and its smooth-L1 form: curved only where the residual is small."""

    def _hessian(self, outputs: Tensor) -> Tensor:
        delta = getattr(self.node, "_saved_delta", None)
        width = delta if delta is not None else self.node._saved_beta
        inside: Tensor = (outputs - self.node._saved_target).abs() < width
        return inside.to(outputs) * (1.0 if delta is not None else 1 / width)


_KINDS: dict[str, type[LossNode]] = {
    "LogSoftmaxBackward0": SoftmaxLoss,
    "BinaryCrossEntropyWithLogitsBackward0": CoinLogitsLoss,
    "BinaryCrossEntropyBackward0": CoinLoss,
    "MseLossBackward0": SquaredLoss,
    "HuberLossBackward0": HuberLoss,
    "SmoothL1LossBackward0": HuberLoss,
}


def find_losses(loss: Tensor) -> list[LossNode]:
    """Return the loss functions near the root of a loss's graph, in order of their distance."""
    waiting, seen = deque([loss.grad_fn]), {loss.grad_fn}
    found = []
    while waiting and len(seen) < _NODES_TO_SEARCH:
        node: Any = waiting.popleft()
        kind = _kind_of(node)
        if kind is not None:
            found.append(kind(node))
            continue
        for following in _following(node):
            if following not in seen:
                seen.add(following)
                waiting.append(following)
    return found


def _kind_of(node: Any) -> type[LossNode] | None:
    if node is None:
        return None
    if node.name() == "PowBackward0" and node._saved_exponent == 2:
        return SquarePower
    return _KINDS.get(node.name())


def _following(node: Any) -> Iterator[Any]:
    if node is not None:
        yield from (following for following, _ in node.next_functions if following is not None)


def _uniform(like: Tensor, generator: Generator) -> Tensor:
    return torch.rand(like.shape, generator=generator, device=like.device, dtype=like.dtype)


def term_weights(loss: Tensor, nodes: Sequence[LossNode]) -> list[Tensor | None]:
    """Return the weight of every term of every loss function in ``loss``; ``None`` if unused."""
    grads = torch.autograd.grad(
        loss, [node.value for node in nodes], retain_graph=True, allow_unused=True
    )
    with torch.no_grad():
        return [
            None if grad is None else node.weights(grad)
            for node, grad in zip(nodes, grads, strict=True)
        ]


def sampled_gradients(loss: Tensor, generator: Generator) -> list[tuple[GradientEdge, Tensor]]:
    """Draw labels, and return gradients whose outer products average to the loss's Hessian.

    Args:
        loss: The loss of a batch, on its graph.
        generator: Where the draws come from.

    Returns:
        Places of the model's outputs on the graph, each with a gradient: the sum over terms of the
        square root of their weight in ``loss`` times the gradient for a drawn label.
    """
    nodes = find_losses(loss)
    weights = term_weights(loss, nodes) if nodes else []
    with torch.no_grad():
        return [
            (node.outputs, node.sample(generator) * weight.clamp_min(0).sqrt())
            for node, weight in zip(nodes, weights, strict=True)
            if weight is not None
        ]


class LossSummary:
    """Per sample, from the backward pass: number of loss terms, and how curved they are.

    Args:
        loss: The loss of a batch of ``n`` samples, whose backward pass is to come.
        n: Number of samples.
    """

    def __init__(self, loss: Tensor, n: int) -> None:
        self._n = n
        # Sums over a sample's terms: weights, their squares, traces, squared gradients.
        self._sums: list[Tensor] = []
        for node in find_losses(loss):
            node.node.register_hook(self._hook(node))

    def _hook(self, node: LossNode) -> Callable[[Any, Any], None]:
        waiting = [node]

        def hook(inputs: tuple[Tensor | None, ...], outputs: tuple[Tensor | None, ...]) -> None:
            if waiting and inputs[0] is not None and outputs[0] is not None:
                with torch.no_grad():
                    self._add(waiting.pop(), outputs[0], inputs[0])

        return hook

    def _add(self, node: LossNode, value_grad: Tensor, outputs_grad: Tensor) -> None:
        weights = node.weights(value_grad)
        if weights.numel() % self._n:
            return
        trace, square = node.summarize(outputs_grad / torch.where(weights == 0, 1, weights))
        squares = weights.square()
        parts = [weights, squares, weights * trace, squares * square]
        # Terms of one sample lie together, whether or not samples still have an axis of their own.
        sums = [part.reshape(self._n, -1).sum(dim=1) for part in parts]
        self._sums = [a + b for a, b in zip(self._sums, sums, strict=True)] if self._sums else sums

    def terms(self) -> Float[Tensor, " n"] | None:
        """Return how many terms of one weight would weigh as each sample's do, if known."""
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
