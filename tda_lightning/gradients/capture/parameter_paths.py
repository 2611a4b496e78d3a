"""Carry per-sample gradients of a parameter-only tensor back to the parameters it is made of.

A weight usually meets data as its transpose, as a cast, or as one entry of a stack. Such steps keep
gradients factored. Any other function of parameters is differentiated once per sample.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge

from tda_lightning.gradients.gradient_layouts import to_dense
from tda_lightning.gradients.graph.walk import Edge, output_shape
from tda_lightning.gradients.nodes.rule import Contribution, input_gradients
from tda_lightning.gradients.nodes.saved_values import is_checkpointed, what_reopens

# Gradients of all samples that are computed at once, in numbers.
_MAX_NUMBERS_AT_ONCE = 2**26


@dataclass(slots=True)
class ParameterGradient:
    """Per-sample gradients of a parameter, or of some of its rows.

    Attributes:
        parameter: The parameter.
        contribution: Factors of its rows as a matrix, or gradients ``(n, *shape)``.
        shape: Shape of these rows.
        start: Position of the first of them in the flattened parameter.
    """

    parameter: nn.Parameter
    contribution: Contribution
    shape: tuple[int, ...]
    start: int = 0

    @property
    def dtype(self) -> torch.dtype:
        """Number format of the gradients or of their factors."""
        contribution = self.contribution
        if isinstance(contribution, Tensor):
            return contribution.dtype
        coarse = contribution.inputs.dtype, contribution.grad_outputs.dtype
        if coarse[0] is coarse[1]:
            return coarse[0]
        formats = [dtype for dtype in coarse if dtype.is_floating_point]
        return max(formats, key=lambda dtype: torch.finfo(dtype).eps)

    @property
    def size(self) -> int:
        """Number of entries."""
        return math.prod(self.shape)

    def in_rows_of(self, columns: int) -> Contribution:
        """Return the gradients as matrices of that many columns, factored if they are stored so."""
        if isinstance(self.contribution, Tensor) or self.shape[0] * columns == self.size:
            return self.contribution
        return self.contribution.products()


def to_parameters(
    edge: Edge, contribution: Contribution, recorded: Mapping[Tensor, object]
) -> Iterable[ParameterGradient]:
    """Return the gradients of the recorded parameters that a parameter-only tensor is made of."""
    shape = output_shape(edge)
    while functions := edge[0].next_functions:
        name = type(edge[0]).__name__
        if len(shape) == 2 and name in ("TransposeBackward0", "PermuteBackward0"):
            name = "TBackward0" if _swaps(edge[0]) else "AliasBackward0"
        child = functions[0]
        part = _PARTS.get(name)
        if part is not None:
            start, leaf = part(edge, shape, output_shape(child)), _cast_leaf(child)
            if start is not None and leaf is not None:
                return [ParameterGradient(leaf, contribution, shape, start)]
        step = _STEPS.get(name)
        before = () if step is None else output_shape(child)
        moved = None if step is None else step(contribution, shape, before)
        if moved is None:
            return _differentiated(edge, contribution, shape, recorded)
        edge, contribution, shape = child, moved, before
    return [ParameterGradient(edge[0].variable, contribution, shape)]


def _cast_leaf(edge: Edge) -> nn.Parameter | None:
    """Return the parameter of which a tensor is the value, or a cast."""
    node = edge[0]
    while type(node).__name__ == "ToCopyBackward0":
        node = node.next_functions[0][0]
    parameter: nn.Parameter | None = None if node.next_functions else node.variable
    return parameter


# Steps that keep all entries: from per-sample gradients of the result, its shape and the shape of
# the tensor before, to gradients of that tensor; ``None`` where factors would be lost.
_Shape = tuple[int, ...]
_Step = Callable[[Contribution, _Shape, _Shape], Contribution | None]
# Steps that take some rows of a parameter: the position of the first entry, where it has one.
_Part = Callable[[Edge, _Shape, _Shape], int | None]


def _same(contribution: Contribution, shape: _Shape, before: _Shape) -> Contribution:
    return contribution


def _transposed(contribution: Contribution, shape: _Shape, before: _Shape) -> Contribution | None:
    if len(shape) != 2:
        return None
    if isinstance(contribution, Tensor):
        return contribution.mT
    return contribution.transposed()


def _reshaped(contribution: Contribution, shape: _Shape, before: _Shape) -> Contribution | None:
    if isinstance(contribution, Tensor):
        return contribution.reshape(-1, *before)
    return contribution if before and before[0] == shape[0] else None


def _entry(edge: Edge, shape: _Shape, before: _Shape) -> int | None:
    """One entry of a stack, ``stack[i]``."""
    node = edge[0]
    if node._saved_dim != 0:
        return None
    return _signed(node._saved_index) % before[0] * math.prod(shape)


def _unbound(edge: Edge, shape: _Shape, before: _Shape) -> int | None:
    return edge[1] * math.prod(shape) if edge[0]._saved_dim == 0 else None


def _slice(edge: Edge, shape: _Shape, before: _Shape) -> int | None:
    node = edge[0]
    if node._saved_dim != 0 or node._saved_step != 1:
        return None
    start = _signed(node._saved_start)
    return min(start + before[0] if start < 0 else start, before[0]) * math.prod(shape[1:])


def _chunk(edge: Edge, shape: _Shape, before: _Shape) -> int | None:
    node, number = edge
    return number * node._saved_split_size * math.prod(shape[1:]) if node._saved_dim == 0 else None


def _sized_chunk(edge: Edge, shape: _Shape, before: _Shape) -> int | None:
    node, number = edge
    if node._saved_dim != 0:
        return None
    return int(sum(node._saved_split_sizes[:number])) * math.prod(shape[1:])


def _swaps(node: Any) -> bool:
    """Return whether a transposition or permutation of a matrix swaps its axes."""
    if hasattr(node, "_saved_dims"):
        return _signed(node._saved_dims[0]) % 2 == 1
    return _signed(node._saved_dim0) % 2 != _signed(node._saved_dim1) % 2


def _signed(number: int) -> int:
    """Undo the conversion of negative numbers to unsigned ones."""
    return number - 2**64 if number >= 2**63 else number


_STEPS: dict[str, _Step] = {
    "ToCopyBackward0": _same,
    "CloneBackward0": _same,
    "AliasBackward0": _same,
    "TBackward0": _transposed,
    "ViewBackward0": _reshaped,
    "UnsafeViewBackward0": _reshaped,
    "ReshapeAliasBackward0": _reshaped,
    "UnsqueezeBackward0": _reshaped,
    "SqueezeBackward0": _reshaped,
    "SqueezeBackward1": _reshaped,
}
_PARTS: dict[str, _Part] = {
    "SelectBackward0": _entry,
    "UnbindBackward0": _unbound,
    "SliceBackward0": _slice,
    "SplitBackward0": _chunk,
    "SplitWithSizesBackward0": _sized_chunk,
}


def dense(contribution: Contribution, shape: tuple[int, ...]) -> Tensor:
    """Return per-sample gradients as a tensor, ``(n, *shape)``."""
    values = contribution if isinstance(contribution, Tensor) else contribution.products()
    return values.reshape(-1, *shape)


def _differentiated(
    edge: Edge,
    contribution: Contribution,
    shape: tuple[int, ...],
    recorded: Mapping[Tensor, object],
) -> Iterator[ParameterGradient]:
    parameters = [leaf for leaf in leaves(edge) if leaf in recorded]
    gradients = dense(contribution, shape).to(_dtype(edge))
    largest = max(math.prod(shape), *(parameter.numel() for parameter in parameters))
    at_once = max(1, _MAX_NUMBERS_AT_ONCE // largest)
    parts = [_vjp(edge, parameters, part) for part in torch.split(gradients, at_once)]
    for number, parameter in enumerate(parameters):
        joined = torch.cat([part[number] for part in parts])
        yield ParameterGradient(parameter, joined, tuple(parameter.shape))


def _dtype(edge: Edge) -> torch.dtype:
    node, number = edge
    dtype: torch.dtype = node._input_metadata[number].dtype
    return dtype


def _vjp(edge: Edge, parameters: list[nn.Parameter], gradients: Tensor) -> list[Tensor]:
    nodes = _nodes_behind(edge[0])
    backward = _engine_backward
    if any(map(is_checkpointed, nodes)):  # Each pass of the engine would run the checkpoint again.
        backward = partial(_backward_by_node, nodes)
    per_sample = [backward(edge, parameters, gradient) for gradient in gradients]
    return [torch.stack([*map(to_dense, values)]) for values in zip(*per_sample, strict=True)]


def _engine_backward(
    edge: Edge, parameters: Sequence[nn.Parameter], gradient: Tensor
) -> Sequence[Tensor]:
    return torch.autograd.grad([GradientEdge(*edge)], parameters, [gradient], retain_graph=True)


def _backward_by_node(
    nodes: Sequence[Any], edge: Edge, parameters: Sequence[nn.Parameter], gradient: Tensor
) -> Sequence[Tensor]:
    """Call one node after the other, with what the checkpoint recomputed for the pass that runs."""
    arrived: dict[Any, dict[int, Tensor]] = {node: {} for node in nodes}
    arrived[edge[0]][edge[1]] = gradient
    for node in nodes:
        if not arrived[node] or not node.next_functions:
            continue
        reopen = what_reopens(node)
        grads = [arrived[node].get(number) for number in range(len(node._input_metadata))]
        for (child, number), value in zip(
            node.next_functions, input_gradients(node, grads), strict=True
        ):
            if child is not None and value is not None:
                metadata, sums = child._input_metadata[number], arrived[child]
                value = value.sum_to_size(metadata.shape).to(metadata.dtype)
                sums[number] = sums[number] + value if number in sums else value
        reopen()
    values = {node.variable: arrived[node] for node in nodes if hasattr(node, "variable")}
    return [values[each].get(0, torch.zeros_like(each)) for each in parameters]


def _nodes_behind(root: Any) -> list[Any]:
    """Return a node and those behind it, each before its inputs."""
    order: dict[Any, None] = {}
    stack = [(root, False)]
    while stack:
        node, is_done = stack.pop()
        if is_done:
            order.setdefault(node)
        elif node is not None and node not in order:
            stack.append((node, True))
            stack += [(child, False) for child, _ in node.next_functions]
    return list(reversed(order))


def leaves(edge: Edge) -> list[nn.Parameter]:
    """Return the parameters that a parameter-only tensor is made of."""
    found: dict[nn.Parameter, None] = {}
    waiting, seen = [edge[0]], {edge[0]}
    while waiting:
        node = waiting.pop()
        if not node.next_functions:
            variable = getattr(node, "variable", None)
            if variable is not None:
                found[variable] = None
            continue
        for child, _ in node.next_functions:
            if child is not None and child not in seen:
                seen.add(child)
                waiting.append(child)
    return list(found)


def a_parameter(edge: Edge) -> Any:
    """Return one of the parameters that a parameter-only tensor is made of."""
    node = edge[0]
    while node.next_functions:
        node = next(child for child, _ in node.next_functions if child is not None)
    return node.variable
