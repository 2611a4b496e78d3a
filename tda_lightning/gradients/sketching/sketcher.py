"""Sketcher: the linear map from one model's gradients to sketch rows.

It has two parts. A :class:`BlockMap` shrinks one layer's gradient or leaves it whole. A
:class:`ColumnMap` adds the results of all layers to the columns of a row.
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
        widths: Number of columns per block, or ``None`` if the blocks share columns.
    """

    def __init__(
        self,
        block_maps: Sequence[BlockMap],
        column_map: ColumnMap,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self._unscaled_blocks = block_maps
        self._blocks = block_maps
        self._column_map = column_map
        self._device = device
        self._dtype = dtype
        self.dimension = column_map.dimension
        self.widths = column_map.widths

    def precondition(self, preconditioner: Preconditioner) -> None:
        """Multiply all further gradients by these factors before they are sketched."""
        rows = preconditioner.rows.to(self._device, self._dtype)
        columns = preconditioner.columns.to(self._device, self._dtype)
        parts = zip(
            self._unscaled_blocks,
            torch.split(rows, [block.rows for block in self._unscaled_blocks]),
            torch.split(columns, [block.columns for block in self._unscaled_blocks]),
            strict=True,
        )
        self._blocks = [block.scaled(r, c) for block, r, c in parts]

    def empty_rows(self, n: int) -> Float[Tensor, "n k"]:
        """Return ``n`` rows of zeros, to pass to :meth:`add_`."""
        return torch.zeros(n, self.dimension, device=self._device, dtype=self._dtype)

    def add_(self, rows: Float[Tensor, "n k"], block: int, factors: GradientFactors) -> None:
        """Add the sketches of one block's per-sample gradients to ``rows``, in place."""
        self._column_map.add_(rows, block, self._blocks[block].project(factors, self._dtype))

    def sketch_matrix(
        self, block: int, matrix: Float[Tensor, "rows columns"]
    ) -> Float[Tensor, " k"]:
        """Sketch one gradient of a block, given as a matrix: the direct form of :meth:`add_`."""
        row = self.empty_rows(1)
        # `project_matrix` may return a view of the caller's matrix, and `add_` may overwrite it.
        values = self._blocks[block].project_matrix(matrix.to(self._dtype)).clone()
        self._column_map.add_(row, block, values[None])
        return row[0]


@dataclass(frozen=True)
class BlockMap:
    """The map of one block: on each side a matrix, or ``None`` to leave the side unchanged.

    Attributes:
        rows: Number of rows of the block.
        columns: Number of columns of the block.
        left: Applied to the rows, shape ``(rows, mapped rows)``.
        right: Applied to the columns, shape ``(columns, mapped columns)``.
        scale: Multiplied by the entries of the mapped block, shape ``(1 or mapped rows, 1 or
            mapped columns)``. It holds a preconditioner's factors for unchanged sides.
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
        ones = rows.new_ones(1)
        row_scale = rows if self.left is None else ones
        column_scale = columns if self.right is None else ones
        scale = row_scale[:, None] * column_scale
        left = None if self.left is None else rows[:, None] * self.left
        right = None if self.right is None else columns[:, None] * self.right
        return BlockMap(self.rows, self.columns, left, right, scale)

    def to(self, device: torch.device, dtype: torch.dtype) -> BlockMap:
        """Return the map on another device, or in another number format."""
        left = None if self.left is None else self.left.to(device, dtype)
        right = None if self.right is None else self.right.to(device, dtype)
        return BlockMap(self.rows, self.columns, left, right)

    def project(self, factors: GradientFactors, dtype: torch.dtype) -> Float[Tensor, "n m"]:
        """Map per-sample gradients to flat rows of length ``size``."""
        inputs = _apply(factors.inputs, self.right, dtype)
        grads = _apply(factors.grad_outputs, self.left, dtype)
        products = _sum_of_outer_products(grads, inputs)
        return (products if self.scale is None else products.mul_(self.scale)).flatten(1)

    def project_matrix(self, matrix: Float[Tensor, "rows columns"]) -> Float[Tensor, " m"]:
        """Map one gradient, given as a matrix, to a flat row."""
        mapped = matrix if self.left is None else self.left.mT @ matrix
        mapped = mapped if self.right is None else mapped @ self.right
        return (mapped if self.scale is None else mapped * self.scale).flatten()


def _apply(operand: Operand, matrix: Tensor | None, dtype: torch.dtype) -> Tensor:
    return operand.dense(dtype) if matrix is None else operand.project(matrix)


def _sum_of_outer_products(
    grads: Float[Tensor, "n s a"], inputs: Float[Tensor, "n s b"]
) -> Float[Tensor, "n a b"]:
    if grads.shape[1] == 1:  # Broadcasting is faster than rank-one matrix products.
        return grads.mT * inputs
    return grads.mT @ inputs


class ColumnMap(ABC):
    """Map from the entries of all mapped blocks to the columns of a row."""

    dimension: int
    widths: tuple[int, ...] | None = None

    @abstractmethod
    def to(self, device: torch.device, dtype: torch.dtype) -> ColumnMap:
        """Return the map on another device, or in another number format."""

    @abstractmethod
    def add_(self, rows: Float[Tensor, "n k"], block: int, values: Float[Tensor, "n m"]) -> None:
        """Add a block's values to ``rows``, in place; the values may be overwritten."""


class SideBySide(ColumnMap):
    """Each block has separate columns."""

    def __init__(self, sizes: Sequence[int]) -> None:
        ends = np.cumsum(sizes).tolist()
        self._slices = [slice(end - size, end) for end, size in zip(ends, sizes, strict=True)]
        self.dimension = ends[-1]
        self.widths = tuple(sizes)

    def to(self, device: torch.device, dtype: torch.dtype) -> ColumnMap:
        """Return the map itself: it holds no tensors."""
        return self

    def add_(self, rows: Float[Tensor, "n k"], block: int, values: Float[Tensor, "n m"]) -> None:
        """Add a block's values to its columns."""
        rows[:, self._slices[block]] += values


class Hashed(ColumnMap):
    """Each entry is added to one random column with a random sign (count sketch)."""

    def __init__(self, buckets: Sequence[Tensor], signs: Sequence[Tensor], dimension: int) -> None:
        self._buckets = buckets
        self._signs = signs
        self.dimension = dimension

    def to(self, device: torch.device, dtype: torch.dtype) -> ColumnMap:
        """Return the map on another device, or in another number format."""
        buckets = [table.to(device) for table in self._buckets]
        return Hashed(buckets, [signs.to(device, dtype) for signs in self._signs], self.dimension)

    def add_(self, rows: Float[Tensor, "n k"], block: int, values: Float[Tensor, "n m"]) -> None:
        """Add a block's values, with their signs, to their hashed columns."""
        rows.index_add_(1, self._buckets[block], values.mul_(self._signs[block]))


class Multiplied(ColumnMap):
    """Each entry is added to every column with a random sign (dense projection)."""

    def __init__(self, matrices: Sequence[Tensor]) -> None:
        self._matrices = matrices
        self.dimension = matrices[0].shape[1]

    def to(self, device: torch.device, dtype: torch.dtype) -> ColumnMap:
        """Return the map on another device, or in another number format."""
        return Multiplied([matrix.to(device, dtype) for matrix in self._matrices])

    def add_(self, rows: Float[Tensor, "n k"], block: int, values: Float[Tensor, "n m"]) -> None:
        """Add a block's values, multiplied by its matrix."""
        rows.addmm_(values, self._matrices[block])
