"""ColumnMap: add the shrunk gradients of all blocks to the columns of a row."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor


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
    def add_(
        self,
        rows: Float[Tensor, "n k"],
        blocks: tuple[int, ...],
        values: Sequence[Tensor],
    ) -> None:
        """Add the values of some blocks to ``rows``, in place."""

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

    def add_(
        self,
        rows: Float[Tensor, "n k"],
        blocks: tuple[int, ...],
        values: Sequence[Tensor],
    ) -> None:
        """Add the blocks' values to their columns."""
        for block, block_values in zip(blocks, values, strict=True):
            rows[:, self._slices[block]] += self._scaled(block, block_values)


@dataclass(frozen=True)
class _Table:
    """The columns of the entries of some blocks, one after another.

    Attributes:
        blocks: Numbers of the blocks.
        buckets: Column of each entry.
        order: Entries sorted by their columns.
        starts: Position of each column's first entry in ``order``.
        is_sorting_fast: Whether summing the entries in that order is faster than scattering them:
            most lie in memory with the samples last.
    """

    blocks: tuple[int, ...]
    buckets: Int[Tensor, " m"]
    order: Int[Tensor, " m"]
    starts: Int[Tensor, " k"]
    is_sorting_fast: bool


class Hashed(ColumnMap):
    """Each entry is added to one random column with a random sign (count sketch)."""

    def __init__(self, buckets: Sequence[Tensor], signs: Sequence[Tensor], dimension: int) -> None:
        super().__init__()
        self._buckets = buckets
        self._signs = signs
        self.dimension = dimension
        # Most steps have the same blocks.
        self._table: _Table | None = None
        # The signs of its entries, times their factors, in the order in which they are used.
        self._factors: Tensor | None = None

    def to(self, device: torch.device, dtype: torch.dtype) -> ColumnMap:
        """Return the map on another device, or in another number format."""
        buckets = [table.to(device) for table in self._buckets]
        return Hashed(buckets, [signs.to(device, dtype) for signs in self._signs], self.dimension)

    def scale(self, scales: Sequence[Tensor | None]) -> None:
        """Multiply the signs of each block by its factors."""
        super().scale(scales)
        self._factors = None

    def add_(
        self,
        rows: Float[Tensor, "n k"],
        blocks: tuple[int, ...],
        values: Sequence[Tensor],
    ) -> None:
        """Add the blocks' values, with their signs, to their hashed columns."""
        if len(values) == 1:
            (block,) = blocks
            scaled = values[0] * self._scaled(block, self._signs[block])
            rows.index_add_(1, self._buckets[block], scaled)
            return
        table = self._table
        if table is None or table.blocks != blocks:
            table = self._table = self._joined(blocks, values)
            self._factors = None
        if self._factors is None:
            factors = torch.cat([self._scaled(block, self._signs[block]) for block in blocks])
            self._factors = factors[table.order] if table.is_sorting_fast else factors
        if table.is_sorting_fast:
            entries = torch.cat([block_values.mT for block_values in values])  # (m, n)
            sums = torch.embedding_bag(
                entries, table.order, table.starts, mode=0, per_sample_weights=self._factors
            )[0]
            rows += sums.mT
        else:
            rows.index_add_(1, table.buckets, torch.cat(list(values), dim=1).mul_(self._factors))

    def _joined(self, blocks: tuple[int, ...], values: Sequence[Tensor]) -> _Table:
        buckets = torch.cat([self._buckets[block] for block in blocks])
        order = torch.argsort(buckets, stable=True)
        sizes = torch.bincount(buckets, minlength=self.dimension)
        samples_last = sum(v.shape[1] for v in values if v.stride(0) == 1 and len(v) > 1)
        is_fast = buckets.device.type == "cpu" and values[0].dtype == torch.float32
        is_fast &= 2 * samples_last > len(buckets)
        return _Table(blocks, buckets, order, sizes.cumsum(0) - sizes, is_fast)


class Multiplied(ColumnMap):
    """Each entry is added to every column with a random sign (dense projection)."""

    def __init__(self, matrices: Sequence[Tensor]) -> None:
        super().__init__()
        self._matrices = matrices
        self.dimension = matrices[0].shape[1]

    def to(self, device: torch.device, dtype: torch.dtype) -> ColumnMap:
        """Return the map on another device, or in another number format."""
        return Multiplied([matrix.to(device, dtype) for matrix in self._matrices])

    def add_(
        self,
        rows: Float[Tensor, "n k"],
        blocks: tuple[int, ...],
        values: Sequence[Tensor],
    ) -> None:
        """Add the blocks' values, multiplied by their matrices."""
        for block, block_values in zip(blocks, values, strict=True):
            rows.addmm_(self._scaled(block, block_values), self._matrices[block])
