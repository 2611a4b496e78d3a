"""Find loss functions on a loss's autograd graph, and sample their labels."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from tda_lightning.gradients.losses.binary_losses import BernoulliLogitsLoss, BernoulliLoss
from tda_lightning.gradients.losses.loss_nodes import LossNode, SoftmaxLoss
from tda_lightning.gradients.losses.regression_losses import HuberLoss, SquaredLoss, SquarePower

# Loss functions are near the root of the graph; the model behind them may be large.
_MAX_SEARCHED_NODES = 500

_KINDS: dict[str, type[LossNode]] = {
    "LogSoftmaxBackward0": SoftmaxLoss,
    "BinaryCrossEntropyWithLogitsBackward0": BernoulliLogitsLoss,
    "BinaryCrossEntropyBackward0": BernoulliLoss,
    "MseLossBackward0": SquaredLoss,
    "HuberLossBackward0": HuberLoss,
    "SmoothL1LossBackward0": HuberLoss,
}


def find_losses(loss: Tensor, with_samples: Collection[Any]) -> list[LossNode]:
    """Return the loss functions near the root of a loss's graph, in order of their distance.

    A function of parameters alone, such as a squared weight, is a penalty, not a loss of samples.

    Args:
        loss: The loss of a batch, with its graph.
        with_samples: The nodes of the graph whose outputs depend on samples; functions of others
            are left out.
    """
    return [
        loss_node
        for loss_node in find_losses_and_penalties(loss)
        if any(child in with_samples for child in _children(loss_node.node))
    ]


def find_losses_and_penalties(loss: Tensor) -> list[LossNode]:
    """Return the loss functions near the root, including penalties on parameters."""
    waiting, seen = deque([loss.grad_fn]), {loss.grad_fn}
    found = []
    while waiting and len(seen) < _MAX_SEARCHED_NODES:
        node = waiting.popleft()
        kind = _kind_of(node)
        if kind is not None:
            found.append(kind(node))
            continue
        for child in _children(node):
            if child not in seen:
                seen.add(child)
                waiting.append(child)
    return found


def nodes_near(loss: Tensor) -> list[Any]:
    """Return the nodes near the root of a loss's graph, in order of their distance."""
    if loss.grad_fn is None:
        return []
    nodes = {loss.grad_fn: None}  # In order of insertion.
    waiting = deque(nodes)
    while waiting and len(nodes) < _MAX_SEARCHED_NODES:
        for child in _children(waiting.popleft()):
            if child not in nodes:
                nodes[child] = None
                waiting.append(child)
    return list(nodes)


def _kind_of(node: Any) -> type[LossNode] | None:
    if node is None:
        return None
    if node.name() == "PowBackward0" and node._saved_exponent == 2:
        return SquarePower
    return _KINDS.get(node.name())


def _children(node: Any) -> Iterator[Any]:
    if node is not None:
        yield from (child for child, _ in node.next_functions if child is not None)


def term_weights(loss: Tensor, nodes: Sequence[LossNode]) -> list[Tensor | None]:
    """Return the weights in ``loss`` of each loss function's terms; ``None`` if it is unused."""
    grads = torch.autograd.grad(
        loss, [node.value for node in nodes], retain_graph=True, allow_unused=True
    )
    with torch.no_grad():
        return [
            None if grad is None else node.weights(grad)
            for node, grad in zip(nodes, grads, strict=True)
        ]


def sampled_gradients(
    loss: Tensor, nodes: Sequence[LossNode], generator: Generator
) -> list[tuple[GradientEdge, Tensor]]:
    """Sample labels, and return gradients whose outer products average to the loss's Hessian.

    Args:
        loss: The loss of a batch, with its graph.
        nodes: Its loss functions.
        generator: Generator of the samples.

    Returns:
        Edges of the model's outputs in the graph, each with a gradient. It is the sum over terms of
        the gradient for a sampled label times the square root of the term's weight in ``loss``.
    """
    weights = term_weights(loss, nodes) if nodes else []
    with torch.no_grad():
        return [
            (node.outputs, node.sample(generator) * weight.clamp_min(0).sqrt())
            for node, weight in zip(nodes, weights, strict=True)
            if weight is not None
        ]


def label_gradients(
    model: nn.Module, loss: Tensor, nodes: Sequence[LossNode], generator: Generator
) -> list[tuple[GradientEdge, Tensor]]:
    """Return the gradients of a loss of any model, as :func:`sampled_gradients` do.

    Args:
        model: The model; its method ``sampled_output_gradients(loss, generator)`` takes precedence.
        loss: The loss of a batch, with its graph.
        nodes: Its loss functions.
        generator: Generator of the samples.

    Raises:
        ValueError: If labels cannot be sampled for the loss.
    """
    sample = getattr(model, "sampled_output_gradients", None)
    if sample is not None:
        return [(get_gradient_edge(outputs), grad) for outputs, grad in sample(loss, generator)]
    gradients = sampled_gradients(loss, nodes, generator)
    if not gradients:
        raise ValueError(
            f"Labels cannot be sampled for the loss of `{type(model).__name__}."
            "training_step`: expected cross-entropy, binary cross-entropy, squared error, "
            "Huber's loss, or a method `sampled_output_gradients(loss, generator)` of the "
            "model. Write that method, or record with `curvature='none'`."
        )
    return gradients
