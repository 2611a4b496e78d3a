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
        """Map per-sample gradients to flat rows of length ``size``."""
        left, right = self.left, self.right
        if isinstance(contribution, Tensor):
            if left is None and right is None:
                is_flat = contribution.ndim == 2
                values = contribution if is_flat else contribution.reshape(len(contribution), -1)
                return values.to(dtype)
            return _project_dense(contribution, self.rows, left, right, dtype).flatten(1)
        inputs, grads = contribution.inputs, contribution.grad_outputs
        if (
            left is not None
            and right is not None
            and isinstance(inputs, Dense)
            and isinstance(grads, Dense)
            and contribution.correction is None
        ):
            return Factored(grads.project_rows(left), inputs.project_rows(right), inputs.n)
        return contribution.project(left, right, dtype).flatten(1)

    def project_matrix(self, matrix: Float[Tensor, "rows columns"]) -> Float[Tensor, " m"]:
        """Map one gradient, given as a matrix, to a flat row."""
        mapped = matrix if self.left is None else self.left.mT @ matrix
        mapped = mapped if self.right is None else mapped @ self.right
        return mapped.flatten()


def project_part(
    block: BlockMap, rows: slice, columns: slice, contribution: Contribution, dtype: torch.dtype
) -> Float[Tensor, "n m"]:
    """Map gradients of some rows and columns of a block, to the length of the whole mapped block.

    Its other rows and columns are filled with zeros, where they are not shrunk.
    """
    left = None if block.left is None else block.left[rows]
    right = None if block.right is None else block.right[columns]
    if isinstance(contribution, Tensor):
        products = _project_dense(contribution, rows.stop - rows.start, left, right, dtype)
    else:
        products = contribution.project(left, right, dtype)
    above_below = (rows.start, block.rows - rows.stop) if left is None else (0, 0)
    sides = (columns.start, block.columns - columns.stop) if right is None else (0, 0)
    padding = (*sides, *above_below)
    return (functional.pad(products, padding) if any(padding) else products).flatten(1)


@dataclass(slots=True)
class Factored:
    """Shrunk gradients whose outer products are not computed yet: many blocks' are at once."""

    left: Float[Tensor, "ns a"]
    right: Float[Tensor, "ns b"]
    n: int

    @property
    def shapes(self) -> tuple[int, ...]:
        """Sizes that the factors of blocks must share to be multiplied together."""
        return (*self.left.shape, self.right.shape[1], self.n)


def multiply(blocks: Sequence[Factored], dtype: torch.dtype) -> Float[Tensor, "blocks n m"]:
    """Return the outer products of blocks of the same shapes."""
    left = torch.stack([block.left for block in blocks]).to(dtype)
    right = torch.stack([block.right for block in blocks]).to(dtype)
    return multiply_stacks(left, right, blocks[0].n)


def multiply_stacks(
    left: Float[Tensor, "blocks ns a"], right: Float[Tensor, "blocks ns b"], n: int
) -> Float[Tensor, "blocks n m"]:
    """Return the outer products of the rows of two stacks, summed over each sample's rows."""
    count, rows, a = left.shape
    b = right.shape[2]
    if rows == n:
        return outer(left, right).transpose(0, 1).flatten(2)
    products = torch.bmm(left.view(count * n, -1, a).mT, right.view(count * n, -1, b))
    return products.view(count, n, a * b)


def times(
    stack: Float[Tensor, "k m d"], matrices: Float[Tensor, "k d w"]
) -> Float[Tensor, "k m w"]:
    """Multiply each matrix of a stack by another, in the number format of the latter."""
    stack = stack.to(matrices.dtype)
    return stack[0].mm(matrices[0])[None] if len(stack) == 1 else torch.bmm(stack, matrices)


# Per-sample gradients of a mapped block, ``(n, m)``, or their factors.
Shrunk = Tensor | Factored


def _project_dense(
    values: Tensor, rows: int, left: Tensor | None, right: Tensor | None, dtype: torch.dtype
) -> Float[Tensor, "n a b"]:
    mapped = values.reshape(len(values), rows, -1).to(dtype)
    mapped = mapped if left is None else left.mT @ mapped
    return mapped if right is None else mapped @ right
