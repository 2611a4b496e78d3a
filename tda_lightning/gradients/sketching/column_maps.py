"""ColumnMap: add the shrunk gradients of all blocks to the columns of a row."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from tda_lightning.gradients.sketching.block_maps import Products, Shrunk

# Numbers of blocks of one shape, with their shrunk gradients.
Stack = tuple[tuple[int, ...], Shrunk]


class ColumnMap(ABC):
    """Map from the entries of all mapped blocks to the columns of a row.

    Attributes:
        dimension: Number of columns.
        widths: Number of columns per block, if each has separate ones.
    """

    dimension: int
    widths: tuple[int, ...] | None = None

    def __init__(self) -> None:
        # Factors of each block's mapped entries, which a preconditioner sets.
        self._scales: Sequence[Tensor | None] | None = None

    def scale(self, scales: Sequence[Tensor | None]) -> None:
        """Multiply the entries of each mapped block by these factors before they are added."""
        self._scales = scales

    @abstractmethod
    def to(self, device: torch.device, dtype: torch.dtype) -> ColumnMap:
        """Return the map on another device, or in another number format."""

    @abstractmethod
    def rows_of(self, stacks: Sequence[Stack], n: int) -> Float[Tensor, "n k"]:
        """Return ``n`` rows with the values of at least one block."""

    def _zeros(self, stacks: Sequence[Stack], n: int) -> Float[Tensor, "n k"]:
        return _numbers(stacks[0][1]).new_zeros(n, self.dimension)

    def _scaled(self, block: int, values: Tensor) -> Tensor:
        scale = None if self._scales is None else self._scales[block]
        return values if scale is None else values * scale.flatten()


class SideBySide(ColumnMap):
    """Each block has separate columns."""

    def __init__(self, sizes: Sequence[int]) -> None:
        super().__init__()
        ends = np.cumsum(sizes).tolist()
        self._slices = [slice(end - size, end) for end, size in zip(ends, sizes, strict=True)]
        self.dimension = ends[-1]
        self.widths = tuple(sizes)

    def to(self, device: torch.device, dtype: torch.dtype) -> ColumnMap:
        """Return the map itself: it holds no tensors."""
        return self

    def rows_of(self, stacks: Sequence[Stack], n: int) -> Float[Tensor, "n k"]:
        """Return rows with the blocks' values in their columns."""
        rows = self._zeros(stacks, n)
        for block, block_values in _unstacked(stacks):
            rows[:, self._slices[block]] += self._scaled(block, block_values)
        return rows


@dataclass
class _Table:
    """The columns of the entries of some blocks, one after another.

    Attributes:
        buckets: Column of each entry.
        order: Entries sorted by their columns.
        starts: Position of each column's first entry in ``order``.
        factors: Signs of the entries, times their factors, in the order in which they are used.
            They are computed when they are needed.
        is_sorted: Whether that is ``order``.
    """

    buckets: Int[Tensor, " m"]
    order: Int[Tensor, " m"]
    starts: Int[Tensor, " k"]
    factors: Tensor | None = None
    is_sorted: bool = False


# Groups of blocks whose tables are kept: most steps have the same blocks.
_MAX_TABLES = 8


class Hashed(ColumnMap):
    """Each entry is added to one random column with a random sign (count sketch)."""

    def __init__(self, buckets: Sequence[Tensor], signs: Sequence[Tensor], dimension: int) -> None:
        super().__init__()
        self._buckets = buckets
        self._signs = signs
        self.dimension = dimension
        self._tables: dict[tuple[tuple[int, ...], ...], _Table] = {}

    def to(self, device: torch.device, dtype: torch.dtype) -> ColumnMap:
        """Return the map on another device, or in another number format."""
        buckets = [table.to(device) for table in self._buckets]
        return Hashed(buckets, [signs.to(device, dtype) for signs in self._signs], self.dimension)

    def scale(self, scales: Sequence[Tensor | None]) -> None:
        """Multiply the signs of each block by its factors."""
        super().scale(scales)
        for table in self._tables.values():
            table.factors = None

    def rows_of(self, stacks: Sequence[Stack], n: int) -> Float[Tensor, "n k"]:
        """Return the sum of the blocks' values, with their signs, in their hashed columns."""
        blocks = tuple(numbers for numbers, _ in stacks)
        if len(blocks) == len(blocks[0]) == 1:
            block, values = blocks[0][0], _values_of(stacks[0][1])[0]
            scaled = values * self._scaled(block, self._signs[block])
            return self._zeros(stacks, n).index_add_(1, self._buckets[block], scaled)
        numbers = _numbers(stacks[0][1])
        is_sorting_fast = numbers.device.type == "cpu" and numbers.dtype == torch.float32 and n > 1
        table, factors = self._table(blocks, is_sorting_fast)
        if is_sorting_fast:
            # One pass over memory: sums of sorted entries, which lie there with the samples last.
            sums = torch.embedding_bag(
                _entries(stacks, n), table.order, table.starts, mode=0, per_sample_weights=factors
            )
            return sums[0].mT.contiguous()
        parts = [_values_of(values).transpose(0, 1).reshape(n, -1) for _, values in stacks]
        entries = torch.cat(parts, dim=1).mul_(factors)
        return self._zeros(stacks, n).index_add_(1, table.buckets, entries)

    def _table(
        self, blocks: tuple[tuple[int, ...], ...], is_sorted: bool
    ) -> tuple[_Table, Float[Tensor, " m"]]:
        """Return the table of some blocks, and its factors."""
        table = self._tables.get(blocks)
        if table is None:
            if len(self._tables) == _MAX_TABLES:
                self._tables.clear()
            table = self._tables[blocks] = self._joined(blocks)
        factors = table.factors
        if factors is None or table.is_sorted != is_sorted:
            numbers = [block for part in blocks for block in part]
            factors = torch.cat([self._scaled(block, self._signs[block]) for block in numbers])
            factors = factors[table.order] if is_sorted else factors
            table.factors, table.is_sorted = factors, is_sorted
        return table, factors

    def _joined(self, blocks: tuple[tuple[int, ...], ...]) -> _Table:
        buckets = torch.cat([self._buckets[block] for part in blocks for block in part])
        order = torch.argsort(buckets, stable=True)
        sizes = torch.bincount(buckets, minlength=self.dimension)
        return _Table(buckets, order, sizes.cumsum(0) - sizes)


class Multiplied(ColumnMap):
    """Each entry is added to every column with a random sign (dense projection)."""

    def __init__(self, matrices: Sequence[Tensor]) -> None:
        super().__init__()
        self._matrices = matrices
        self.dimension = matrices[0].shape[1]

    def to(self, device: torch.device, dtype: torch.dtype) -> ColumnMap:
        """Return the map on another device, or in another number format."""
        return Multiplied([matrix.to(device, dtype) for matrix in self._matrices])

    def rows_of(self, stacks: Sequence[Stack], n: int) -> Float[Tensor, "n k"]:
        """Return the sum of the blocks' values, multiplied by their matrices."""
        rows = self._zeros(stacks, n)
        for block, block_values in _unstacked(stacks):
            rows.addmm_(self._scaled(block, block_values), self._matrices[block])
        return rows


def _values_of(values: Shrunk) -> Float[Tensor, "blocks n m"]:
    """Return the gradients of blocks as a tensor."""
    return values.values() if isinstance(values, Products) else values


def _numbers(values: Shrunk) -> Tensor:
    return values.left if isinstance(values, Products) else values


def _entries(stacks: Sequence[Stack], n: int) -> Float[Tensor, "m n"]:
    """Return the entries of all blocks, samples last."""
    sizes = [values.numel() // n for _, values in stacks]
    entries = _numbers(stacks[0][1]).new_empty(sum(sizes), n)
    for (_, values), part in zip(stacks, torch.split(entries, sizes), strict=True):
        # A copy is far faster than a concatenation of transposed views: of matrices most of all.
        if isinstance(values, Products):
            values.write(part)
        elif len(values) == 1:
            part.copy_(values[0].mT)
        else:
            part.view(len(values), -1, n).copy_(values.mT)
    return entries


def _unstacked(stacks: Sequence[Stack]) -> Iterator[tuple[int, Tensor]]:
    for blocks, values in stacks:
        yield from zip(blocks, _values_of(values), strict=True)
