"""Sketcher: a projector bound to the blocks of one model, a linear map ready to be applied.

It has two parts. A :class:`BlockMap` shrinks one layer's gradient, or takes it whole; a
:class:`ColumnMap` says where the results of all layers go in a row.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from tda_lightning.gradients.factors import GradientFactors, Operand
from tda_lightning.stores.step import Preconditioner


class Sketcher:
    """A projector bound to the blocks of one model.

    Attributes:
        dimension: Length ``k`` of a sketch row.
        widths: Number of its columns that belong to each block, or ``None`` where they share them.
    """

    def __init__(
        self,
        blocks: Sequence[BlockMap],
        columns: ColumnMap,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self._plain = blocks
        self._blocks = blocks
        self._columns = columns
        self._device = device
        self._dtype = dtype
        self.dimension = columns.dimension
        self.widths = columns.widths

    def precondition(self, preconditioner: Preconditioner) -> None:
        """From now on, multiply gradients by these factors before they are sketched."""
        rows = preconditioner.rows.to(self._device, self._dtype)
        columns = preconditioner.columns.to(self._device, self._dtype)
        parts = zip(
            self._plain,
            torch.split(rows, [block.rows for block in self._plain]),
            torch.split(columns, [block.columns for block in self._plain]),
            strict=True,
        )
        self._blocks = [block.scaled(r, c) for block, r, c in parts]

    def empty_rows(self, n: int) -> Float[Tensor, "n k"]:
        """Return ``n`` rows of zeros, to be added to."""
        return torch.zeros(n, self.dimension, device=self._device, dtype=self._dtype)

    def add_(self, rows: Float[Tensor, "n k"], block: int, factors: GradientFactors) -> None:
        """Add the sketches of one block's per-sample gradients to ``rows``, in place."""
        self._columns.add_(rows, block, self._blocks[block].project(factors, self._dtype))

    def sketch_matrix(
        self, block: int, matrix: Float[Tensor, "rows columns"]
    ) -> Float[Tensor, " k"]:
        """Sketch a gradient given as its block's matrix: the obvious form of :meth:`add_`."""
        row = self.empty_rows(1)
        # A block that is taken whole may come back as it is, and it is not ours.
        values = self._blocks[block].project_matrix(matrix.to(self._dtype)).clone()
        self._columns.add_(row, block, values[None])
        return row[0]


@dataclass(frozen=True)
class BlockMap:
    """The map of one block: a matrix on either side, or none.

    Attributes:
        rows: Rows of the block, before.
        columns: Columns of the block, before.
        left: Applied to the rows, shape ``(rows, rows after)``.
        right: Applied to the columns, shape ``(columns, columns after)``.
        scale: Multiplied with the entries of the mapped block, shape ``(1 or rows after, 1 or
            columns after)``: what of a preconditioner concerns sides that are not mapped.
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
        """Return the map of blocks whose entries are multiplied by ``rows[i] * columns[j]``."""
        one = rows.new_ones(1)
        scale = (rows if self.left is None else one)[:, None] * (
            columns if self.right is None else one
        )
        left = None if self.left is None else rows[:, None] * self.left
        right = None if self.right is None else columns[:, None] * self.right
        return BlockMap(self.rows, self.columns, left, right, scale)

    def to(self, device: torch.device, dtype: torch.dtype) -> BlockMap:
        """Return the same map elsewhere."""
        left = None if self.left is None else self.left.to(device, dtype)
        right = None if self.right is None else self.right.to(device, dtype)
        return BlockMap(self.rows, self.columns, left, right)

    def project(self, factors: GradientFactors, dtype: torch.dtype) -> Float[Tensor, "n m"]:
        """Map per-sample gradients, shape ``(n, size)``."""
        inputs = _apply(factors.inputs, self.right, dtype)
        grads = _apply(factors.grad_outputs, self.left, dtype)
        products = _sum_of_outer_products(grads, inputs)
        return (products if self.scale is None else products.mul_(self.scale)).flatten(1)

    def project_matrix(self, matrix: Float[Tensor, "rows columns"]) -> Float[Tensor, " m"]:
        """Map one gradient, given as a matrix."""
        shrunk = matrix if self.left is None else self.left.mT @ matrix
        shrunk = shrunk if self.right is None else shrunk @ self.right
        return (shrunk if self.scale is None else shrunk * self.scale).flatten()


def _apply(operand: Operand, matrix: Tensor | None, dtype: torch.dtype) -> Tensor:
    return operand.dense(dtype) if matrix is None else operand.project(matrix)


def _sum_of_outer_products(
    grads: Float[Tensor, "n s a"], inputs: Float[Tensor, "n s b"]
) -> Float[Tensor, "n a b"]:
    if grads.shape[1] == 1:  # Broadcasting beats a batch of rank-one matrix products.
        return grads.mT * inputs
    return grads.mT @ inputs


class ColumnMap(ABC):
    """Where the entries of every mapped block go in a row."""

    dimension: int
    widths: tuple[int, ...] | None = None

    @abstractmethod
    def to(self, device: torch.device, dtype: torch.dtype) -> ColumnMap:
        """Return the same map elsewhere."""

    @abstractmethod
    def add_(self, rows: Float[Tensor, "n k"], block: int, values: Float[Tensor, "n m"]) -> None:
        """Add a block's values to ``rows``, in place; the values may be overwritten."""


class SideBySide(ColumnMap):
    """Every block has columns of its own."""

    def __init__(self, sizes: Sequence[int]) -> None:
        ends = np.cumsum(sizes).tolist()
        self._slices = [slice(end - size, end) for end, size in zip(ends, sizes, strict=True)]
        self.dimension = ends[-1]
        self.widths = tuple(sizes)

    def to(self, device: torch.device, dtype: torch.dtype) -> ColumnMap:
        """Return itself: there is nothing to move."""
        return self

    def add_(self, rows: Float[Tensor, "n k"], block: int, values: Float[Tensor, "n m"]) -> None:
        """Add a block's values to its columns."""
        rows[:, self._slices[block]] += values


class Hashed(ColumnMap):
    """Every entry goes, with a random sign, to a random column: one hash per entry."""

    def __init__(self, buckets: Sequence[Tensor], signs: Sequence[Tensor], dimension: int) -> None:
        self._buckets = buckets
        self._signs = signs
        self.dimension = dimension

    def to(self, device: torch.device, dtype: torch.dtype) -> ColumnMap:
        """Return the same hash tables elsewhere."""
        buckets = [table.to(device) for table in self._buckets]
        return Hashed(buckets, [signs.to(device, dtype) for signs in self._signs], self.dimension)

    def add_(self, rows: Float[Tensor, "n k"], block: int, values: Float[Tensor, "n m"]) -> None:
        """Add a block's values, signed, to the columns that the hash names."""
        rows.index_add_(1, self._buckets[block], values.mul_(self._signs[block]))


class Multiplied(ColumnMap):
    """Every entry goes to every column, with a random weight."""

    def __init__(self, matrices: Sequence[Tensor]) -> None:
        self._matrices = matrices
        self.dimension = matrices[0].shape[1]

    def to(self, device: torch.device, dtype: torch.dtype) -> ColumnMap:
        """Return the same matrices elsewhere."""
        return Multiplied([matrix.to(device, dtype) for matrix in self._matrices])

    def add_(self, rows: Float[Tensor, "n k"], block: int, values: Float[Tensor, "n m"]) -> None:
        """Add a block's values, multiplied with its matrix."""
        rows.addmm_(values, self._matrices[block])
