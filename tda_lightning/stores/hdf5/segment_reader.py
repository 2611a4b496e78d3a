"""Read steps from a segment.

The facts of all its steps are read at once, their rows block by block.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from tda_lightning.stores.hdf5.segment_datasets import (
    StepColumns,
    read_visits,
    require_unchanged,
    stamp_of,
)
from tda_lightning.stores.hdf5.segment_file import (
    SegmentIdentity,
    open_hdf5,
    read_header,
    read_indices,
    reading_segment,
    require_checksum,
    require_identity,
    require_lengths,
    require_plain,
    require_steps,
)
from tda_lightning.stores.integrity.damage import require_stored_bytes
from tda_lightning.stores.step import OPTIONAL_FACTS, Step, StepFacts

# Small enough to stay in a processor's cache between the disk and the first product.
_BLOCK_BYTES = 2**20


class Segment:
    """A sealed segment. Only the step indices are read before a step is accessed."""

    def __init__(self, path: Path, expected: SegmentIdentity | None = None) -> None:
        self.path = path
        with reading_segment(path):
            self._stamp = stamp_of(path)
            self.header = read_header(path)
            with open_hdf5(path) as file:
                self.indices = read_indices(file)
            if not self.indices:
                raise ValueError("it holds no step")
            if self.header is not None:
                require_steps(self.header, self.indices)
                require_identity(self.header, expected or self.header.identity)

    def __len__(self) -> int:
        return len(self.indices)

    @cached_property
    def steps(self) -> StepColumns:
        """The steps without their visits."""
        with reading_segment(self.path):
            self.require_intact()  # Before anything else is read.
            has_checksums = self.header is not None and self.header.crc32 is None
            columns = StepColumns(self.path, self._stamp, has_checksums)
            self.require_unchanged()
        return columns

    @cached_property
    def is_verified(self) -> bool:
        """Whether the content has its checksum; false for older versions, which wrote none.

        Raises:
            StoreFileError: If it has another one.
        """
        with reading_segment(self.path):
            self.require_unchanged()
            require_stored_bytes(self.path)
            if self.header is not None:
                require_checksum(self.path, self.header)
            with open_hdf5(self.path) as file:
                require_plain(file)
        return self.header is not None

    def require_intact(self) -> None:
        """Check the content against its checksum, once; rows are checked when they are read.

        Raises:
            StoreFileError: If it has another one.
        """
        _ = self.is_verified  # Not in an `assert`, which `python -O` leaves out.

    def require_unchanged(self) -> None:
        """Check that the file has not been replaced.

        Raises:
            StoreFileError: If the file has changed since it was opened.
        """
        with reading_segment(self.path):
            require_unchanged(self.path, self._stamp, stamp_of(self.path))

    def visited_ids(self) -> Int[Tensor, " n"]:
        """Return the sorted ids of the samples in this segment."""
        self.require_intact()
        with reading_segment(self.path), open_hdf5(self.path) as file:
            ids: Tensor = torch.unique(torch.from_numpy(file["visits/sample_id"][:]))
        return ids


class OpenSegment:
    """A segment in memory: all visits without rows, and one block of steps with rows."""

    def __init__(self, segment: Segment) -> None:
        self._path = segment.path
        self._columns = segment.steps
        offset, curvature_offset = self._columns.offset, self._columns.curvature_offset
        with reading_segment(segment.path):
            with open_hdf5(segment.path) as file:
                visits = read_visits(file["visits"])
                self._scales = file["visits/scale"][:]
                self._curvature_scales = file["curvature/scale"][:]
            segment.require_unchanged()
            require_lengths(offset[-1], **visits, scale=self._scales)
            require_lengths(curvature_offset[-1], scale=self._curvature_scales)
        self._visits = {name: torch.from_numpy(values) for name, values in visits.items()}
        self._is_known = {name: _is_known(visits[name], offset) for name in OPTIONAL_FACTS}
        self._blocks = self._columns.blocks or split(
            offset, max(1, _BLOCK_BYTES // self._columns.sketch.row_bytes)
        )
        self._cached: tuple[range, list[Step]] = (range(0), [])

    def facts_at(self, position: int) -> StepFacts:
        """Return a step without its rows."""
        span = slice(self._columns.offset[position], self._columns.offset[position + 1])
        visits = {
            name: values[span]
            for name, values in self._visits.items()
            if name not in self._is_known or self._is_known[name][position]
        }
        return self._columns.facts(position, visits)

    def step_at(self, position: int) -> Step:
        """Return a step; read its block unless it is cached."""
        block, steps = self._cached
        if position not in block:
            number = next(n for n, candidate in enumerate(self._blocks) if position in candidate)
            block, steps = self._blocks[number], self._read(number)
            # Set both in one assignment: another thread may be reading too.
            self._cached = (block, steps)
        return steps[position - block.start]

    def _read(self, number: int) -> list[Step]:
        """Read the steps of a block; their rows are views of one tensor."""
        with reading_segment(self._path):
            return self._read_block(number)

    def _read_block(self, number: int) -> list[Step]:
        block, columns = self._blocks[number], self._columns
        offset, curvature_offset = columns.offset, columns.curvature_offset
        visits, curvature = _span(offset, block), _span(curvature_offset, block)
        sketch = columns.sketch.read(visits, self._scales[visits], number)
        scales = self._curvature_scales[curvature]
        sampled = columns.curvature_rows.read(curvature, scales, number)
        return [
            Step.of(
                self.facts_at(position),
                sketch=_part(sketch, offset, block, position),
                curvature_rows=_if_any(_part(sampled, curvature_offset, block, position)),
            )
            for position in block
        ]


def split(offset: Sequence[int], visits_per_block: int) -> list[range]:
    """Split steps into blocks of at most ``visits_per_block`` visits, or of one step."""
    blocks = []
    start = 0
    for stop in range(1, len(offset)):
        is_last = stop == len(offset) - 1
        if is_last or offset[stop + 1] - offset[start] > visits_per_block:
            blocks.append(range(start, stop))
            start = stop
    return blocks


def blocks_of(counts: Sequence[int], rows: np.ndarray) -> list[range]:
    """Return the blocks of steps that are read at once, given their visits and encoded rows."""
    visits_per_block = _BLOCK_BYTES // (rows.shape[1] * rows.dtype.itemsize)
    return split(np.cumsum([0, *counts]).tolist(), max(1, visits_per_block))


def _span(offset: Sequence[int], block: range) -> slice:
    return slice(offset[block.start], offset[block.stop])


def _part(values: Tensor, offset: Sequence[int], block: range, position: int) -> Tensor:
    first = offset[block.start]
    return values[offset[position] - first : offset[position + 1] - first]


def _is_known(values: np.ndarray, offset: Sequence[int]) -> list[bool]:
    """Return for every step whether the column was recorded; NaN in all visits means unknown."""
    # Some values may be NaN in a recorded column: those of samples whose loss is not finite.
    n_missing = np.concatenate([[0], np.isnan(values).cumsum()])
    n_visits = np.diff(offset)
    known: list[bool] = ((np.diff(n_missing[offset]) < n_visits) | (n_visits == 0)).tolist()
    return known


def _if_any(rows: Tensor) -> Tensor | None:
    return rows if len(rows) else None
