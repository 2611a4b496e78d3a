"""Blocks: where parameters lie in a block's matrix, and how its gradients are shrunk.

A :class:`BlockMap` shrinks per-sample gradients on both sides, or leaves them whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn
from torch.nn import functional

from tda_lightning.gradients.factors import Dense, outer
from tda_lightning.gradients.nodes import Contribution
from tda_lightning.gradients.parameter_selection import ParameterSelection
from tda_lightning.stores.recipe import Block


@dataclass(frozen=True)
class Place:
    """Where a parameter lies in the matrix of a block: its first row and column, and its size."""

    block: int
    row: int
    column: int
    rows: int
    columns: int


def places(selection: ParameterSelection) -> dict[nn.Parameter, Place]:
    """Return where each recorded parameter lies."""
    found: dict[nn.Parameter, Place] = {}
    for number, (block, parameters) in enumerate(
        zip(selection.blocks, selection.parameters, strict=True)
    ):
        start = 0
        for parameter in parameters:
            if block.columns == 1:
                found[parameter] = Place(number, start, 0, parameter.numel(), 1)
                start += parameter.numel()
            else:
                columns = parameter.numel() // block.rows
                found[parameter] = Place(number, 0, start, block.rows, columns)
                start += columns
    return found


def lay_out(block: Block, tensors: Sequence[Tensor]) -> Shaped[Tensor, "rows columns"]:
    """Lay out one tensor per parameter of a block, such as gradients, as the block's matrix."""
    if len(tensors) == 1:
        return tensors[0].reshape(block.rows, -1)
    if block.columns == 1:
        return torch.cat([tensor.flatten() for tensor in tensors])[:, None]
    first, *rest = tensors
    matrix = first.reshape(block.rows, -1)
    return torch.cat([matrix, *(tensor[:, None] for tensor in rest)], dim=1) if rest else matrix


@dataclass(frozen=True)
class BlockMap:
    """The map of one block: on each side a matrix, or ``None`` to leave the side unchanged.

    Attributes:
        left: Applied to the rows, shape ``(rows, mapped rows)``.
        right: Applied to the columns, shape ``(columns, mapped columns)``.
        scale: Multiplied by the entries of the mapped block, shape ``(mapped rows, mapped
            columns)``. It holds a preconditioner's factors for unchanged sides.
    """

    rows: int
    columns: int
    left: Tensor | None = None
    right: Tensor | None = None
    scale: Tensor | None = None

    @property
    def size(self) -> int:
        """Length of the mapped and flattened block."""
        rows = self.rows if self.left is None else self.left.shape[1]
        columns = self.columns if self.right is None else self.right.shape[1]
        return rows * columns

    def scaled(self, rows: Float[Tensor, " rows"], columns: Float[Tensor, " columns"]) -> BlockMap:
        """Return a map that first multiplies entry ``(i, j)`` by ``rows[i] * columns[j]``."""
        left = None if self.left is None else rows[:, None] * self.left
        right = None if self.right is None else columns[:, None] * self.right
        scale = None
        if self.columns == 1 and left is None:
            scale = (rows * columns)[:, None]
        elif left is None or right is None:
            row_scale = rows if left is None else rows.new_ones(left.shape[1])
            column_scale = columns if right is None else rows.new_ones(right.shape[1])
            scale = torch.outer(row_scale, column_scale)
        return BlockMap(self.rows, self.columns, left, right, scale)

    def to(self, device: torch.device, dtype: torch.dtype) -> BlockMap:
        """Return the map on another device, or in another number format."""
        left = None if self.left is None else self.left.to(device, dtype)
        right = None if self.right is None else self.right.to(device, dtype)
        return BlockMap(self.rows, self.columns, left, right)

    def project(self, contribution: Contribution, dtype: torch.dtype) -> Shrunk:
        """Map per-sample gradients to flat rows of length ``size``, as a stack of one."""
        left, right = self.left, self.right
        if isinstance(contribution, Tensor):
            if left is None and right is None:
                return contribution.reshape(1, len(contribution), -1).to(dtype)
            return _project_dense(contribution, self.rows, left, right, dtype).flatten(1)[None]
        inputs, grads = contribution.inputs, contribution.grad_outputs
        if (
            isinstance(inputs, Dense)
            and isinstance(grads, Dense)
            and contribution.correction is None
        ):
            rows = grads.project_rows(left, dtype), inputs.project_rows(right, dtype)
            return products(rows[0][None], rows[1][None], inputs.n)
        return contribution.project(left, right, dtype).flatten(1)[None]

    def project_matrix(self, matrix: Float[Tensor, "rows columns"]) -> Float[Tensor, " m"]:
        """Map one gradient, given as a matrix, to a flat row."""
        mapped = matrix if self.left is None else self.left.mT @ matrix
        mapped = mapped if self.right is None else mapped @ self.right
        return mapped.flatten()


def project_part(
    block: BlockMap, rows: slice, columns: slice, contribution: Contribution, dtype: torch.dtype
) -> Float[Tensor, "1 n m"]:
    """Map gradients of some rows and columns of a block, to the length of the whole mapped block.

    Its other rows and columns are filled with zeros, where they are not shrunk.
    """
    left = None if block.left is None else block.left[rows]
    right = None if block.right is None else block.right[columns]
    if isinstance(contribution, Tensor):
        mapped = _project_dense(contribution, rows.stop - rows.start, left, right, dtype)
    else:
        mapped = contribution.project(left, right, dtype)
    above_below = (rows.start, block.rows - rows.stop) if left is None else (0, 0)
    sides = (columns.start, block.columns - columns.stop) if right is None else (0, 0)
    padding = (*sides, *above_below)
    return (functional.pad(mapped, padding) if any(padding) else mapped).flatten(1)[None]


@dataclass(slots=True)
class Products:
    """Shrunk gradients of several blocks of one shape, as factors that are not multiplied yet.

    Attributes:
        left: One factor, the rows of one sample after those of another.
        right: The other factor.
        n: Number of samples.
    """

    left: Float[Tensor, "blocks ns a"]
    right: Float[Tensor, "blocks ns b"]
    n: int

    def numel(self) -> int:
        """Return the number of entries of the products."""
        return len(self.left) * self.n * self.left.shape[2] * self.right.shape[2]

    def __getitem__(self, part: slice) -> Products:
        """Return those of some blocks."""
        return Products(self.left[part], self.right[part], self.n)

    def values(self) -> Float[Tensor, "blocks n m"]:
        """Return the outer products of the factors' rows, summed over each sample's rows."""
        left, right, n = self.left, self.right, self.n
        count, rows, a = left.shape
        if rows == n:
            return outer(left, right).transpose(0, 1).flatten(2)
        sums = torch.bmm(left.view(count * n, -1, a).mT, right.view(count * n, -1, right.shape[2]))
        return sums.view(count, n, -1)

    def write(self, entries: Float[Tensor, "blocks_m n"]) -> None:
        """Write the entries of all blocks, samples last."""
        (count, rows, a), b, n = self.left.shape, self.right.shape[2], self.n
        if rows == n:
            outer(self.left, self.right, entries.view(count, a, b, n))
        else:
            entries.view(count, a * b, n).copy_(self.values().mT)


def products(
    left: Float[Tensor, "blocks ns a"], right: Float[Tensor, "blocks ns b"], n: int
) -> Shrunk:
    """Return the outer products of rows: multiplied already, unless the factors are smaller."""
    result = Products(left, right, n)
    return result if left.numel() + right.numel() <= result.numel() else result.values()


def times(
    stack: Float[Tensor, "k m d"], matrices: Float[Tensor, "k d w"] | None, dtype: torch.dtype
) -> Float[Tensor, "k m w"]:
    """Multiply each matrix of a stack by another; ``None`` is the identity."""
    stack = stack.to(dtype)
    if matrices is None:
        return stack
    return stack[0].mm(matrices[0])[None] if len(stack) == 1 else torch.bmm(stack, matrices)


# Per-sample gradients of mapped blocks of one shape, ``(blocks, n, m)``, or their factors.
Shrunk = Tensor | Products


def _project_dense(
    values: Tensor, rows: int, left: Tensor | None, right: Tensor | None, dtype: torch.dtype
) -> Float[Tensor, "n a b"]:
    mapped = values.reshape(len(values), rows, -1).to(dtype)
    mapped = mapped if left is None else left.mT @ mapped
    return mapped if right is None else mapped @ right
