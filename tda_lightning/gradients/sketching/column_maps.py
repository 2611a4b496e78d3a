"""ColumnMap: add the shrunk gradients of all blocks to the columns of a row."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float
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


class Hashed(ColumnMap):
    """Each entry is added to one random column with a random sign (count sketch)."""

    def __init__(self, buckets: Sequence[Tensor], signs: Sequence[Tensor], dimension: int) -> None:
        super().__init__()
        self._buckets = buckets
        self._signs = signs
        self.dimension = dimension
        # The tables of the blocks of a step, joined. Most steps have the same blocks.
        self._joined: tuple[tuple[int, ...], Tensor, Tensor] | None = None

    def to(self, device: torch.device, dtype: torch.dtype) -> ColumnMap:
        """Return the map on another device, or in another number format."""
        buckets = [table.to(device) for table in self._buckets]
        return Hashed(buckets, [signs.to(device, dtype) for signs in self._signs], self.dimension)

    def scale(self, scales: Sequence[Tensor | None]) -> None:
        """Multiply the signs of each block by its factors."""
        super().scale(scales)
        self._joined = None

    def add_(
        self,
        rows: Float[Tensor, "n k"],
        blocks: tuple[int, ...],
        values: Sequence[Tensor],
    ) -> None:
        """Add the blocks' values, with their signs, to their hashed columns."""
        if self._joined is None or self._joined[0] != blocks:
            buckets = torch.cat([self._buckets[block] for block in blocks])
            signs = [self._scaled(block, self._signs[block]) for block in blocks]
            self._joined = blocks, buckets, torch.cat(signs)
        _, columns, factors = self._joined
        if len(values) == 1:  # It may be a gradient that autograd still uses.
            rows.index_add_(1, columns, values[0] * factors)
        else:
            rows.index_add_(1, columns, torch.cat(list(values), dim=1).mul_(factors))


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
