"""Find loss functions on a loss's autograd graph, and sample their labels."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import torch
from torch import Generator, Tensor
from torch.autograd.graph import GradientEdge

from tda_lightning.gradients.losses.loss_nodes import (
    BernoulliLogitsLoss,
    BernoulliLoss,
    HuberLoss,
    LossNode,
    SoftmaxLoss,
    SquaredLoss,
    SquarePower,
)

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


def find_losses(loss: Tensor, layer_outputs: Sequence[GradientEdge]) -> list[LossNode]:
    """Return the loss functions near the root of a loss's graph, in order of their distance.

    A function of parameters alone, such as a squared weight, is a penalty, not a loss of samples.
    Its nodes look the same, but no layer's output leads to it: samples enter through layers.

    Args:
        loss: The loss of a batch, with its graph.
        layer_outputs: Edges of the graph where layers returned one output per sample. Functions
            that neither depend on such an output nor run inside a layer are left out.
    """
    layers = {edge.node for edge in layer_outputs}
    return [
        loss_node
        for loss_node, in_layer in _near_root(loss, layers)
        if in_layer or _sees_samples(loss_node.node, layers)
    ]


def find_losses_and_penalties(loss: Tensor) -> list[LossNode]:
    """Return the loss functions near the root, including penalties on parameters."""
    return [loss_node for loss_node, _ in _near_root(loss, ())]


def _near_root(loss: Tensor, layers: Collection[Any]) -> Iterator[tuple[LossNode, bool]]:
    """Yield possible loss functions, and whether each runs inside a layer."""
    waiting, seen = deque([(loss.grad_fn, False)]), {loss.grad_fn}
    while waiting and len(seen) < _MAX_SEARCHED_NODES:
        node, in_layer = waiting.popleft()
        in_layer = in_layer or node in layers
        kind = _kind_of(node)
        if kind is not None:
            yield kind(node), in_layer
            continue
        for child in _children(node):
            if child not in seen:
                seen.add(child)
                waiting.append((child, in_layer))


def _sees_samples(node: Any, layers: Collection[Any]) -> bool:
    """Return whether a node's inputs may depend on samples; only ``False`` is certain."""
    waiting, seen = deque(_children(node)), {node}
    while waiting and len(seen) < _MAX_SEARCHED_NODES:
        current = waiting.popleft()
        # A function written in Python may contain layers that are not hooked, as checkpoints do.
        if current in layers or isinstance(current, torch.autograd.function.BackwardCFunction):
            return True
        seen.add(current)
        waiting.extend(child for child in _children(current) if child not in seen)
    return bool(waiting)


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
