"""The graph of a loss: the loss functions on it, and gradients of sampled labels at them."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import torch
from torch import Generator, Tensor
from torch.autograd.graph import GradientEdge

from tda_lightning.gradients.losses.loss_nodes import (
    BernoulliLoss,
    CoinLogitsLoss,
    HuberLoss,
    LossNode,
    SoftmaxLoss,
    SquaredLoss,
    SquarePower,
)

# A loss function stands near the root of the graph; the model behind it may be large.
_NODES_TO_SEARCH = 500

_KINDS: dict[str, type[LossNode]] = {
    "LogSoftmaxBackward0": SoftmaxLoss,
    "BinaryCrossEntropyWithLogitsBackward0": CoinLogitsLoss,
    "BinaryCrossEntropyBackward0": BernoulliLoss,
    "MseLossBackward0": SquaredLoss,
    "HuberLossBackward0": HuberLoss,
    "SmoothL1LossBackward0": HuberLoss,
}


def find_losses(loss: Tensor, heard: Sequence[GradientEdge]) -> list[LossNode]:
    """Return the loss functions near the root of a loss's graph, in order of their distance.

    What depends on parameters alone, such as the square of a weight, is a penalty and no loss of
    the samples, though its nodes look the same. Samples come in through layers.

    Args:
        loss: The loss of a batch, on its graph.
        heard: Places on the graph where layers gave something for every sample. A function that
            none of them leads to, and that no layer holds, is left out.
    """
    layers = {edge.node for edge in heard}
    return [
        loss_node
        for loss_node, in_layer in _near_root(loss, layers)
        if in_layer or _sees_samples(loss_node.node, layers)
    ]


def find_losses_and_penalties(loss: Tensor) -> list[LossNode]:
    """Return the same, and what looks like one but depends on parameters alone."""
    return [loss_node for loss_node, _ in _near_root(loss, ())]


def _near_root(loss: Tensor, layers: Collection[Any]) -> Iterator[tuple[LossNode, bool]]:
    """Yield what looks like a loss function, and whether a layer holds it."""
    waiting, seen = deque([(loss.grad_fn, False)]), {loss.grad_fn}
    while waiting and len(seen) < _NODES_TO_SEARCH:
        node, in_layer = waiting.popleft()
        in_layer = in_layer or node in layers
        kind = _kind_of(node)
        if kind is not None:
            yield kind(node), in_layer
            continue
        for following in _following(node):
            if following not in seen:
                seen.add(following)
                waiting.append((following, in_layer))


def _sees_samples(node: Any, layers: Collection[Any]) -> bool:
    """Say whether what goes into a node may depend on the samples: sure only where it says no."""
    waiting, seen = deque(_following(node)), {node}
    while waiting and len(seen) < _NODES_TO_SEARCH:
        following = waiting.popleft()
        # A function written in Python may hold layers that nobody hears, as checkpoints do.
        if following in layers or isinstance(following, torch.autograd.function.BackwardCFunction):
            return True
        seen.add(following)
        waiting.extend(one for one in _following(following) if one not in seen)
    return bool(waiting)


def _kind_of(node: Any) -> type[LossNode] | None:
    if node is None:
        return None
    if node.name() == "PowBackward0" and node._saved_exponent == 2:
        return SquarePower
    return _KINDS.get(node.name())


def _following(node: Any) -> Iterator[Any]:
    if node is not None:
        yield from (following for following, _ in node.next_functions if following is not None)


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


def sampled_gradients(
    loss: Tensor, nodes: Sequence[LossNode], generator: Generator
) -> list[tuple[GradientEdge, Tensor]]:
    """Draw labels, and return gradients whose outer products average to the loss's Hessian.

    Args:
        loss: The loss of a batch, on its graph.
        nodes: Its loss functions.
        generator: Where the draws come from.

    Returns:
        Places of the model's outputs on the graph, each with a gradient: the sum over terms of the
        square root of their weight in ``loss`` times the gradient for a drawn label.
    """
    weights = term_weights(loss, nodes) if nodes else []
    with torch.no_grad():
        return [
            (node.outputs, node.sample(generator) * weight.clamp_min(0).sqrt())
            for node, weight in zip(nodes, weights, strict=True)
            if weight is not None
        ]
