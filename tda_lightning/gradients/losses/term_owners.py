"""TermOwners: which of a loss function's terms belong to which sample.

The samples need not come first: ``(T, n, classes)`` in sequence-first models, ``(T * n, classes)``
once they are flattened, nodes of graphs in no regular order. From the loss function, this follows
the graph back to an operation in which the samples' place is known, or has an axis of ``n``
entries, and then tracks it through views, slices and sums.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tda_lightning.gradients.graph.sample_layout import IrregularRows, SampleLayout
from tda_lightning.gradients.graph.walk import output_shape
from tda_lightning.gradients.losses.loss_nodes import LossNode
from tda_lightning.gradients.nodes.saved_values import saved_value

# Where the samples lie in the output of a node, if that is known.
RowsOf = Callable[[Any], SampleLayout | IrregularRows | None]
# Operations between the loss function and the place where the samples are known.
_MAX_NODES = 60
_PERMUTING = frozenset({"TransposeBackward0", "TBackward0", "PermuteBackward0"})
# They move entries, or combine those of several, without a change of shape.
_MOVING = frozenset(
    f"{name}Backward{number}"
    for name in ("Flip", "Roll", "Gather", "Sort", "IndexSelect", "TakeAlongDim", "Mm", "Bmm")
    for number in (0, 1)
)
_PICKING = frozenset({"IndexBackward0", "IndexSelectBackward0"})
_PRODUCTS = frozenset({"MmBackward0", "BmmBackward0"})
_REDUCING = frozenset(
    f"{name}Backward{number}" for name in ("Sum", "Mean", "Logsumexp") for number in (0, 1)
)


@dataclass(frozen=True)
class TermOwners:
    """Entry ``e`` of a tensor, counted in order, belongs to sample ``(e // unit) % period``.

    Attributes:
        shape: Shape of the tensor.
        n: Number of samples.
        unit: Number of consecutive entries of one sample.
        period: Number of units after which the samples repeat: ``n``, or the number of rows.
        rows: The samples of the rows, if they are in no regular order.
    """

    shape: tuple[int, ...]
    n: int
    unit: int
    period: int
    rows: Int[Tensor, " rows"] | None = None

    @classmethod
    def of(cls, layout: SampleLayout | IrregularRows, shape: Sequence[int], n: int) -> TermOwners:
        """Return the owners of a tensor with a layout."""
        inside = prod(shape[layout.axis + 1 :])
        if isinstance(layout, IrregularRows):
            return cls(tuple(shape), n, inside, len(layout.of_rows), layout.of_rows)
        return cls(tuple(shape), n, inside * layout.sizes(shape[layout.axis], n)[1], n)

    def axis(self) -> int | None:
        """Return the axis on which the samples lie, alone or joined, ``None`` if there is none."""
        for axis, size in enumerate(self.shape):
            inside = prod(self.shape[axis + 1 :])
            is_inside = inside > 0 and self.unit % inside == 0
            if is_inside and size % (self.unit // inside * self.period) == 0 and size:
                return axis
        return None

    def with_axes(self, shape: Sequence[int], axis: int) -> TermOwners:
        """Return the owners of a tensor of another shape, whose ``axis`` is that of the samples."""
        before = self.axis()
        assert before is not None
        inner = self.unit // prod(self.shape[before + 1 :])
        return replace(self, shape=tuple(shape), unit=inner * prod(shape[axis + 1 :]))

    def sums(self, terms: Tensor) -> Float[Tensor, " n"]:
        """Sum the terms of each sample; the axis of classes may have one entry."""
        if self.rows is None and terms.numel() == self.n:
            return terms.reshape(self.n)  # one term per sample
        axis = self.axis()
        assert axis is not None
        inner = self.unit // prod(self.shape[axis + 1 :])
        before, after = prod(terms.shape[:axis]), prod(terms.shape[axis + 1 :])
        outer = terms.shape[axis] // (self.period * inner)
        parts = terms.reshape(before, outer, self.period, inner, after)
        totals = parts.sum(dim=(0, 1, 3, 4))
        if self.rows is None:
            return totals
        return totals.new_zeros(self.n).index_add(0, self.rows, totals)


def term_owners(loss_node: LossNode, n: int, rows_of: RowsOf | None = None) -> TermOwners | None:
    """Return which entries of a loss function's outputs belong to which sample.

    Args:
        loss_node: The loss function.
        n: Number of samples.
        rows_of: Returns where the samples lie in the output of a node, as far as that is known.

    Returns:
        The owners, ``None`` if they are unknown.
    """
    chain: list[tuple[Any, int]] = []
    for edge in _edges_behind(loss_node):
        chain.append(edge)
        shape = output_shape(edge)
        known = None if rows_of is None else rows_of(edge[0])
        is_in_order = len(chain) == 1 and loss_node.n_terms(shape) == n
        if is_in_order and not isinstance(known, IrregularRows) and not is_picked(loss_node, n):
            break  # One term per sample is in the order of the samples.
        if known is not None:
            start = TermOwners.of(known, shape, n)
            owners = _tracked(start, chain[:-1])
            if owners is not None and owners.axis() != loss_node.class_axis:
                return _regular(owners)
            if _are_summed(start, chain[:-1]):
                return None
            break
    return _by_shape(chain, n, loss_node.class_axis)


def _regular(owners: TermOwners) -> TermOwners:
    """Return owners without the rows if these are the samples in order, one row each."""
    rows = owners.rows
    if rows is None or not torch.equal(rows.cpu(), torch.arange(owners.n)):
        return owners
    return replace(owners, rows=None)


def is_picked(loss_node: LossNode, n: int) -> bool:
    """Return whether terms have been picked from other rows than one of each sample."""
    node = loss_node.node.next_functions[loss_node.position][0]
    if node is None or node.name() not in _PICKING:
        return False
    return output_shape(node.next_functions[0])[:1] != (n,)


def _by_shape(
    chain: Sequence[tuple[Any, int]], n: int, class_axis: int | None
) -> TermOwners | None:
    """Return the owners if one of the tensors has an axis of ``n`` entries."""
    for position, edge in enumerate(chain):
        shape = output_shape(edge)
        axes = [axis for axis in (0, 1) if axis < len(shape) and shape[axis] == n]
        for axis in axes if position else [axis for axis in axes if axis != class_axis]:
            owners = TermOwners.of(SampleLayout(axis, 1, 1), shape, n)
            tracked = _tracked(owners, chain[:position])
            if tracked is not None and tracked.axis() != class_axis:
                return tracked
    if n > 1 or not chain:
        return None
    shape = output_shape(chain[0])
    owners = TermOwners(tuple(shape), n, prod(shape), n)  # All terms are of the only sample.
    return None if owners.axis() in (None, class_axis) else owners


def _edges_behind(loss_node: LossNode) -> Iterator[tuple[Any, int]]:
    """Yield the outputs from which the outputs of the loss function have been made, one by one."""
    edge = loss_node.node.next_functions[loss_node.position]
    for _ in range(_MAX_NODES):
        if edge[0] is None or not edge[0]._input_metadata:
            return
        yield edge
        edge = _source(edge)


def _source(edge: tuple[Any, int]) -> tuple[Any, int]:
    """Return the input of an operation with the rows of its output."""
    node, size = edge[0], prod(output_shape(edge))
    inputs = [each for each in node.next_functions if each[0] is not None]
    alike = [e for e in inputs if e[0]._input_metadata and prod(output_shape(e)) == size]
    source: tuple[Any, int] = (alike or inputs or [(None, 0)])[0]
    return source


def _tracked(owners: TermOwners, chain: Sequence[tuple[Any, int]]) -> TermOwners | None:
    """Follow owners through operations, the last one first; ``None`` where they get lost."""
    current: TermOwners | None = owners
    for edge in reversed(chain):
        if current is not None:
            current = _after(current, edge[0], output_shape(edge))
    return None if current is None or current.axis() is None else current


def _are_summed(owners: TermOwners, chain: Sequence[tuple[Any, int]]) -> bool:
    """Return whether a product of matrices sums over the samples, as a correlation of features."""
    current: TermOwners | None = owners
    for edge in reversed(chain):
        if current is None or edge[0].name() in _PRODUCTS:
            break
        current = _after(current, edge[0], output_shape(edge))
    else:
        return False
    return current is not None and current.axis() == len(current.shape) - 1


def _after(owners: TermOwners, node: Any, shape: tuple[int, ...]) -> TermOwners | None:
    """Return the owners of an operation's output."""
    name, axis, ndim = node.name(), owners.axis(), len(owners.shape)
    if name == "IndexBackward0":
        return _picked(owners, node, shape)
    if name in _MOVING:
        return None
    if name not in _PERMUTING and prod(shape) == prod(owners.shape):
        return replace(owners, shape=shape)
    axes = _remaining_axes(node, ndim)
    if axis is None or axes is None or axis not in axes:
        return None
    return owners.with_axes(shape, axes.index(axis))


def _remaining_axes(node: Any, ndim: int) -> list[int | None] | None:
    """Return the axes of the input that the output of an operation has, in order.

    ``None`` stands for an axis of another kind, and for an operation that is not known.
    """
    name = node.name()
    axes: list[int | None] = list(range(ndim))
    if name in _PERMUTING:
        return [axes[position] for position in _order(node, ndim)]
    dims = _dims(node, ndim)
    if name == "StackBackward0":
        dim = _signed(node._saved_dim, ndim + 1)
        return [*axes[:dim], None, *axes[dim:]]
    if name == "SliceBackward0":
        return [None if axis in dims else axis for axis in axes]
    if name == "SelectBackward0" or (name in _REDUCING and dims and not node._saved_keepdim):
        return [axis for axis in axes if axis not in dims]
    if name in _REDUCING and dims:
        return [None if axis in dims else axis for axis in axes]
    return None


def _dims(node: Any, ndim: int) -> list[int]:
    saved = getattr(node, "_saved_dim", [])
    return [_signed(dim, ndim) for dim in (saved if isinstance(saved, list | tuple) else [saved])]


def _order(node: Any, ndim: int) -> list[int]:
    if node.name() == "PermuteBackward0":
        return [_signed(dim, ndim) for dim in node._saved_dims]
    order = list(range(ndim))
    saved = (0, ndim - 1) if node.name() == "TBackward0" else (node._saved_dim0, node._saved_dim1)
    first, second = (_signed(dim, ndim) for dim in saved)
    order[first], order[second] = order[second], order[first]
    return order


def _picked(owners: TermOwners, node: Any, shape: tuple[int, ...]) -> TermOwners | None:
    """Return the owners of rows that an index, or a mask, has picked."""
    indices: list[Tensor | None] = []
    for saved in saved_value(node, "indices"):
        is_mask = saved is not None and saved.dtype in (torch.bool, torch.uint8)
        indices += saved.nonzero(as_tuple=True) if is_mask else [saved]
    inside = prod(owners.shape[len(indices) :])
    rows_of_axes = [index for index in indices if index is not None and index.ndim == 1]
    if len(rows_of_axes) < max(len(indices), 1) or not inside or owners.unit % inside:
        return None
    position = torch.zeros_like(rows_of_axes[0])
    for index, length in zip(rows_of_axes, owners.shape, strict=False):
        position = position * length + torch.where(index < 0, index + length, index)
    rows = position // (owners.unit // inside) % owners.period
    rows = rows if owners.rows is None else owners.rows[rows]
    return TermOwners(shape, owners.n, prod(shape[1:]), len(rows), rows)


def _signed(dim: int, ndim: int) -> int:
    """Return an axis counted from the first; autograd saves negative ones as unsigned integers."""
    return (dim - 2**64 if dim >= 2**63 else dim) % max(ndim, 1)
