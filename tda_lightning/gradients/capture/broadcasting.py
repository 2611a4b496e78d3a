"""Broadcasts: what each sample asks of a tensor that all of them share.

A position embedding is looked up once per batch and added to every sample. Its own gradient is the
sum over samples; the addends are seen one step further on the graph, by the operation that
broadcast it, whose output has the samples.
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
# Operations that hand every sample's gradient on as it is, but for a factor.
_BROADCASTS = {"AddBackward0": 1.0, "SubBackward0": -1.0}
# An operation between a shared tensor and its broadcast, and as which input it takes that.
_Link = tuple[Any, int]


@dataclass(frozen=True)
class Shared:
    """A tensor that all samples of a batch share.

    Attributes:
        name: Name of the layer that gave it.
        edge: Where it is on the graph.
        deliver: Wants its gradient, one per sample: shape ``(n, ...)``.
    """

    name: str
    edge: GradientEdge
    deliver: Deliver


def watch_broadcasts(
    loss: Tensor, shared: Sequence[Shared], with_samples: Sequence[GradientEdge], n: int
) -> None:
    """Arrange that the backward pass of ``loss`` delivers each sample's gradient of shared tensors.

    Args:
        loss: The loss of a batch, on its graph.
        shared: The tensors.
        with_samples: Places on the graph that are known to have an axis of samples.
        n: Number of samples, along the first axis of what the tensors are added to.

    Raises:
        ValueError: If one of them meets the samples otherwise than by being added to all of them.
    """
    if not shared:
        return
    consumers = _consumers(loss)
    meeting = _reached_from([edge.node for edge in with_samples], consumers)
    for tensor in shared:
        _climb(tensor, tensor.edge, [], _Graph(consumers, meeting, n))


@dataclass(frozen=True)
class _Graph:
    consumers: _Consumers
    meeting: set[Any]
    n: int


_Consumers = dict[tuple[Any, int], list[tuple[Any, int]]]


def _consumers(loss: Tensor) -> _Consumers:
    """Return, for every place on the graph, the nodes that use it, and as which of their inputs."""
    found: _Consumers = {}
    waiting, seen = deque([loss.grad_fn]), {loss.grad_fn}
    while waiting:
        node: Any = waiting.popleft()
        for position, (following, number) in enumerate(node.next_functions):
            if following is None:
                continue
            found.setdefault((following, number), []).append((node, position))
            if following not in seen:
                seen.add(following)
                waiting.append(following)
    return found


def _reached_from(nodes: Sequence[Any], consumers: _Consumers) -> set[Any]:
    """Return the nodes whose values depend on those of some nodes, and these themselves."""
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


def _climb(tensor: Shared, edge: GradientEdge, chain: Sequence[_Link], graph: _Graph) -> None:
    """Follow a shared tensor, through whatever is made of it, to where it meets the samples."""
    for node, position in graph.consumers.get((edge.node, edge.output_nr), ()):
        above = GradientEdge(node, 0)
        if node not in graph.meeting:
            _climb(tensor, above, [(node, position), *chain], graph)
        elif node.name() in _BROADCASTS and _shape(above) != _shape(edge):
            node.register_hook(_hook(tensor, node, position, chain, graph.n))
        else:
            raise ValueError(
                f"What `{tensor.name}` gives for all samples at once goes into "
                f"`{node.name()}`; expected it to be added to every sample. Call the layer with "
                "one row of indices per sample (`positions.expand(n, -1)`), or leave it out with "
                "`layers=[...]`."
            )


def _shape(edge: GradientEdge) -> tuple[int, ...]:
    node: Any = edge.node
    return tuple(node._input_metadata[edge.output_nr].shape)


def _hook(
    tensor: Shared, node: Any, position: int, chain: Sequence[_Link], n: int
) -> Callable[[Any, Any], None]:
    factor = _BROADCASTS[node.name()] * node._saved_alpha if position else 1.0

    def hook(inputs: tuple[Tensor | None, ...], outputs: tuple[Tensor | None, ...]) -> None:
        grad, total = outputs[0], inputs[position]
        if grad is None or total is None:
            return
        with torch.no_grad():
            found = _before_broadcast(grad, total.shape, n, tensor.name) * factor
            for link, place in chain:
                found = torch.stack([_pulled_back(link, place, one) for one in found])
            tensor.deliver(found)

    return hook


def _pulled_back(node: Any, position: int, grad: Tensor) -> Tensor:
    found = node(grad)
    pulled: Tensor = found[position] if isinstance(found, tuple) else found
    return pulled


def _before_broadcast(grad: Tensor, shape: torch.Size, n: int, name: str) -> Tensor:
    """Return each sample's gradient of a tensor of ``shape`` that was broadcast."""
    has_axis = len(shape) == grad.ndim
    if grad.ndim == 0 or len(grad) != n or (has_axis and shape[0] != 1):
        raise ValueError(
            f"What `{name}` gives for all samples at once, of shape {tuple(shape)}, was added to a "
            f"tensor of shape {tuple(grad.shape)} in a batch of {n} samples; expected the samples "
            "along its first axis. Call the layer with one row of indices per sample, or leave it "
            "out with `layers=[...]`."
        )
    inner = shape[1:] if has_axis else (1,) * (grad.ndim - 1 - len(shape)) + tuple(shape)
    return grad.sum_to_size(n, *inner).reshape(n, *shape)
