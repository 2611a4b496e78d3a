"""Which rows of a tensor belong to which sample of the batch: regular layouts, and irregular rows.

The samples lie on one axis of the tensor, alone or joined with other axes: ``(n * s, d)`` after a
flattening, ``(s, n, d)`` in sequence-first models, ``(views * n, d)`` where several views of a
batch are concatenated. A layout is inferred from shapes first and then proved by
:mod:`~tda_lightning.gradients.capture.probe`.

Graphs of a batch differ in their number of nodes, sentences in their number of words, and a router
sends each expert some tokens. The rules for nodes see such rows sorted by sample and padded with
zeros. A gradient of zero contributes nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


@dataclass(frozen=True)
class SampleLayout:
    """The samples lie on ``axis``, of size ``outer * n * inner``.

    Entry ``r`` of the axis belongs to sample ``(r // inner) % n``. Batches and sequences differ in
    length, so one of the two numbers may be open: it is then whatever fits.

    Attributes:
        axis: The axis with the samples.
        outer: Number of repetitions of the whole batch, or ``None`` for as many as fit.
        inner: Number of consecutive entries of one sample, or ``None`` for as many as fit.
    """

    axis: int
    outer: int | None
    inner: int | None

    @cached_property
    def is_contiguous(self) -> bool:
        """Whether the entries of each sample follow one another on the first axis."""
        return self.axis == 0 and self.outer == 1

    def fits(self, shape: Sequence[int], n: int) -> bool:
        """Return whether a tensor of this shape can have this layout."""
        size = shape[self.axis] if self.axis < len(shape) else 0
        return size > 0 and size % (n * (self.outer or self.inner or 1)) == 0

    def sizes(self, size: int, n: int) -> tuple[int, int]:
        """Return ``outer`` and ``inner`` for an axis of this size."""
        outer = size // (n * self.inner) if self.outer is None and self.inner else self.outer or 1
        return outer, size // (n * outer)

    def samples_first(self, values: Tensor, n: int) -> Tensor:
        """Return a tensor with the samples on a separate first axis.

        The entries of a sample are the next axes: ``(outer * n * inner, d)`` becomes
        ``(n, outer, inner, d)``, where axes of length one are left out.
        """
        outer, inner = self.sizes(values.shape[self.axis], n)
        if self.axis == 0 and outer == 1:
            return values if inner == 1 else values.reshape(n, inner, *values.shape[1:])
        parts = self.unflattened(values, n).movedim(self.axis + 1, 0)
        return parts.squeeze(self.axis + 2) if inner == 1 else parts

    def unflattened(self, values: Tensor, n: int) -> Tensor:
        """Return a tensor with three axes for the one of the samples: ``outer, n, inner``."""
        before, after = values.shape[: self.axis], values.shape[self.axis + 1 :]
        outer, inner = self.sizes(values.shape[self.axis], n)
        return values.reshape(*before, outer, n, inner, *after)

    def totals(self, weights: Float[Tensor, " size"], n: int) -> Float[Tensor, " n"]:
        """Sum one number per entry of the axis to one number per sample."""
        outer, inner = self.sizes(len(weights), n)
        return weights.reshape(outer, n, inner).sum(dim=(0, 2))

    def entries_of(self, size: int, n: int, sample: int) -> Int[Tensor, " m"]:
        """Return the entries of the axis that belong to one sample."""
        return (self.owners(size, n) == sample).nonzero()[:, 0]

    def owners(self, size: int, n: int) -> Int[Tensor, " size"]:
        """Return the sample of each entry of the axis."""
        return torch.arange(size) // self.sizes(size, n)[1] % n


def possible_layouts(shape: Sequence[int], n: int, axes: Sequence[int]) -> Iterator[SampleLayout]:
    """Yield the layouts that a tensor's shape allows, the most common ones first."""
    axes = [axis for axis in axes if axis < len(shape) and shape[axis] and shape[axis] % n == 0]
    for axis in axes:  # An axis of exactly n is more likely than one of a multiple.
        if shape[axis] == n:
            yield SampleLayout(axis, 1, None)
    for axis in axes:
        if shape[axis] > n:
            yield SampleLayout(axis, 1, None)
            yield SampleLayout(axis, None, 1)
            parts = shape[axis] // n
            for inner in range(2, parts):
                if parts % inner == 0:
                    yield SampleLayout(axis, parts // inner, inner)


@dataclass(frozen=True)
class IrregularRows:
    """The samples lie on ``axis``; ``of_rows`` is the sample of each entry of it.

    Entries without a gradient may have the wrong sample; ``is_known`` marks the others.
    """

    of_rows: Int[Tensor, " rows"]
    n: int
    axis: int = 0
    is_known: Bool[Tensor, " rows"] | None = None

    @property
    def is_contiguous(self) -> bool:
        """Whether a tensor can be split into samples as it is."""
        return False

    def fits(self, shape: Sequence[int], n: int) -> bool:
        """Return whether a tensor of this shape can have this layout."""
        return len(shape) > self.axis and shape[self.axis] == len(self.of_rows)

    def sizes(self, size: int, n: int) -> tuple[int, int]:
        """Return one, and the largest number of rows of a sample."""
        return 1, self._slots[1]

    def samples_first(self, values: Tensor, n: int) -> Tensor:
        """Return each sample's rows on a second axis, padded with zeros, ``(n, s, ...)``."""
        slots, length = self._slots
        values = values.movedim(self.axis, 0)
        padded = values.new_zeros(n * length, *values.shape[1:])
        return padded.index_copy(0, slots, values).reshape(n, length, *values.shape[1:])

    def unflattened(self, values: Tensor, n: int) -> Tensor:
        """Return a tensor with three axes for the one of the samples: ``1, n, s``."""
        parts = self.samples_first(values, n).movedim((0, 1), (self.axis, self.axis + 1))
        return parts.unsqueeze(self.axis)

    def totals(self, weights: Float[Tensor, " size"], n: int) -> Float[Tensor, " n"]:
        """Sum one number per entry of the axis to one number per sample."""
        owners = self.of_rows.to(weights.device)
        return weights.new_zeros(n).index_add(0, owners, weights)

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


@dataclass(frozen=True)
class KnownRows:
    """Whose rows a batch has, as far as its data show it, by the number of rows.

    Attributes:
        stated: Rows whose samples the batch states, such as the nodes of graphs.
        followed: Rows to which the samples were followed, such as several views of a batch. Rows
            of that number may have another order in other places.
    """

    stated: Mapping[int, SampleLayout | IrregularRows] = field(default_factory=dict)
    followed: Mapping[int, SampleLayout | IrregularRows] = field(default_factory=dict)

    @property
    def are_irregular(self) -> bool:
        """Whether samples have different numbers of rows, or rows in any order."""
        rows = (*self.stated.values(), *self.followed.values())
        return any(isinstance(each, IrregularRows) for each in rows)

    def axis(self, shape: Sequence[int]) -> int:
        """Return the axis of a tensor's rows: the first, unless they are packed into one entry."""
        return int(len(shape) > 1 and shape[0] == 1 and shape[1] in self.stated)
