"""IrregularRows: rows of a tensor that belong to samples in no regular order.

Graphs of a batch differ in their number of nodes, sentences in their number of words, and a router
sends each expert some tokens. The rules for nodes see such rows sorted by sample and padded with
zeros. A gradient of zero contributes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Int
from torch import Tensor


@dataclass(frozen=True)
class IrregularRows:
    """The samples lie on the first axis, one entry of it belongs to one sample.

    Attributes:
        of_rows: The sample of each entry of the axis.
        n: Number of samples.
    """

    of_rows: Int[Tensor, " rows"]
    n: int

    @property
    def axis(self) -> int:
        """The axis with the samples."""
        return 0

    @property
    def is_contiguous(self) -> bool:
        """Whether a tensor can be split into samples as it is."""
        return False

    def fits(self, shape: Sequence[int], n: int) -> bool:
        """Return whether a tensor of this shape can have this layout."""
        return len(shape) > 0 and shape[0] == len(self.of_rows)

    def sizes(self, size: int, n: int) -> tuple[int, int]:
        """Return one, and the largest number of rows of a sample."""
        return 1, self._slots[1]

    def samples_first(self, values: Tensor, n: int) -> Tensor:
        """Return each sample's rows on a second axis, padded with zeros, ``(n, s, ...)``."""
        slots, length = self._slots
        padded = values.new_zeros(n * length, *values.shape[1:])
        return padded.index_copy(0, slots, values).reshape(n, length, *values.shape[1:])

    def unflattened(self, values: Tensor, n: int) -> Tensor:
        """Return a tensor with three axes for the first one: ``1, n, s``."""
        return self.samples_first(values, n)[None]

    def entries_of(self, size: int, n: int, sample: int) -> Int[Tensor, " m"]:
        """Return the entries of the axis that belong to one sample."""
        return (self.of_rows == sample).nonzero()[:, 0]

    def owners(self, size: int, n: int) -> Int[Tensor, " rows"]:
        """Return the sample of each entry of the axis."""
        return self.of_rows

    @cached_property
    def _slots(self) -> tuple[Int[Tensor, " rows"], int]:
        """The position of each row among the padded ones, and the number of rows of a sample."""
        owners = self.of_rows
        counts = torch.bincount(owners, minlength=self.n)
        length = max(1, int(counts.max()))
        order = owners.argsort(stable=True)
        starts = counts.cumsum(0) - counts
        rank = torch.empty_like(owners)
        rank[order] = torch.arange(len(owners), device=owners.device) - starts[owners[order]]
        return owners * length + rank, length
