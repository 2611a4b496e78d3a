"""Broadcasts: per-sample gradients of tensors that all samples share.

A position embedding is looked up once per batch and added to every sample. The gradient of its
output is already summed over the samples. The summands are found one step further in the graph: at
the operation that broadcasts the embedding, whose output has an axis of samples.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

Deliver = Callable[[Tensor], None]
# Operations that pass on every sample's gradient, multiplied by a factor.
_BROADCASTS = {"AddBackward0": 1.0, "SubBackward0": -1.0}
# A node and the position of one of its inputs.
_NodeInput = tuple[Any, int]
# The users of each output in the graph, which is itself a node and the number of an output.
_Consumers = dict[tuple[Any, int], list[_NodeInput]]


@dataclass(frozen=True)
class Shared:
    """A tensor that all samples of a batch share.

    Attributes:
        name: Name of the layer that returned it.
        edge: Its edge in the autograd graph.
        deliver: Called with its gradient per sample, shape ``(n, ...)``.
    """

    name: str
    edge: GradientEdge
    deliver: Deliver


def hook_broadcasts(
    loss: Tensor, shared: Sequence[Shared], with_samples: Sequence[GradientEdge], n: int
) -> None:
    """Hook the broadcasts of shared tensors, to deliver per-sample gradients during backward.

    Args:
        loss: The loss of a batch, with its graph.
        shared: The shared tensors.
        with_samples: Edges of tensors that are known to have an axis of samples.
        n: Number of samples, along the first axis of the tensors that they are added to.

    Raises:
        ValueError: If a shared tensor is combined with samples other than by addition to all.
    """
    if not shared:
        return
    consumers = _consumers(loss)
    sample_nodes = _reached_from([edge.node for edge in with_samples], consumers)
    for tensor in shared:
        _hook_uses(tensor, tensor.edge, [], _Graph(consumers, sample_nodes, n))


@dataclass(frozen=True)
class _Graph:
    consumers: _Consumers
    sample_nodes: set[Any]  # Nodes whose outputs depend on the samples.
    n: int


def _consumers(loss: Tensor) -> _Consumers:
    """Return all uses of every output in the graph of a loss."""
    consumers: _Consumers = {}
    waiting, seen = deque([loss.grad_fn]), {loss.grad_fn}
    while waiting:
        node: Any = waiting.popleft()
        for position, (following, number) in enumerate(node.next_functions):
            if following is None:
                continue
            consumers.setdefault((following, number), []).append((node, position))
            if following not in seen:
                seen.add(following)
                waiting.append(following)
    return consumers


def _reached_from(nodes: Sequence[Any], consumers: _Consumers) -> set[Any]:
    """Return ``nodes`` and all nodes whose values depend on theirs."""
    above: dict[Any, list[Any]] = {}
    for (node, _), users in consumers.items():
        above.setdefault(node, []).extend(user for user, _ in users)
    waiting, seen = deque(nodes), set(nodes)
    while waiting:
        for user in above.get(waiting.popleft(), ()):
            if user not in seen:
                seen.add(user)
                waiting.append(user)
    return seen


def _hook_uses(
    tensor: Shared, edge: GradientEdge, path: Sequence[_NodeInput], graph: _Graph
) -> None:
    """Follow a shared tensor, or a function of it, through the graph to its broadcasts.

    Args:
        tensor: The shared tensor.
        edge: The edge of that tensor, or of a function of it that is shared too.
        path: The operations between the two, the last one first.
        graph: The graph of the loss.
    """
    for node, position in graph.consumers.get((edge.node, edge.output_nr), ()):
        output = GradientEdge(node, 0)
        if node not in graph.sample_nodes:
            _hook_uses(tensor, output, [(node, position), *path], graph)
        elif node.name() in _BROADCASTS and _shape(output) != _shape(edge):
            node.register_hook(_broadcast_hook(tensor, node, position, path, graph.n))
        else:
            raise ValueError(
                f"The output of `{tensor.name}`, which all samples share, goes into "
                f"`{node.name()}`; expected it to be added to every sample. Call the layer with "
                "one row of indices per sample (`positions.expand(n, -1)`), or leave it out with "
                "`layers=[...]`."
            )


def _shape(edge: GradientEdge) -> tuple[int, ...]:
    node: Any = edge.node
    return tuple(node._input_metadata[edge.output_nr].shape)


def _broadcast_hook(
    tensor: Shared, node: Any, position: int, path: Sequence[_NodeInput], n: int
) -> Callable[[Any, Any], None]:
    factor = _BROADCASTS[node.name()] * node._saved_alpha if position else 1.0

    def hook(inputs: tuple[Tensor | None, ...], outputs: tuple[Tensor | None, ...]) -> None:
        grad, total = outputs[0], inputs[position]
        if grad is None or total is None:
            return
        with torch.no_grad():
            grads = _before_broadcast(grad, total.shape, n, tensor.name) * factor
            for operation, operand in path:
                grads = torch.stack([_backward_through(operation, operand, g) for g in grads])
            tensor.deliver(grads)

    return hook


def _backward_through(node: Any, position: int, grad: Tensor) -> Tensor:
    input_grads = node(grad)
    input_grad: Tensor = input_grads[position] if isinstance(input_grads, tuple) else input_grads
    return input_grad


def _before_broadcast(grad: Tensor, shape: torch.Size, n: int, name: str) -> Tensor:
    """Return the per-sample gradients of a tensor of ``shape`` that was broadcast."""
    has_axis = len(shape) == grad.ndim
    if grad.ndim == 0 or len(grad) != n or (has_axis and shape[0] != 1):
        raise ValueError(
            f"The output of `{name}`, which all samples share, has shape {tuple(shape)} and was "
            f"added to a tensor of shape {tuple(grad.shape)} in a batch of {n} samples; expected "
            "the samples along its first axis. Call the layer with one row of indices per sample, "
            "or leave it out with `layers=[...]`."
        )
    inner = shape[1:] if has_axis else (1,) * (grad.ndim - 1 - len(shape)) + tuple(shape)
    return grad.sum_to_size(n, *inner).reshape(n, *shape)
