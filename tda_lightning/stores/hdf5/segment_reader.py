"""Read steps from a segment.

The facts of all its steps are read at once, their rows block by block.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import h5py
import torch
from jaxtyping import Int
from torch import Tensor

from tda_lightning.stores.hdf5.segment_datasets import (
    STEP_DATASETS,
    VISIT_DATASETS,
    Datasets,
    StepColumns,
    VisitColumns,
)
from tda_lightning.stores.hdf5.segment_file import (
    SegmentIdentity,
    open_hdf5,
    read_datasets,
    read_header,
    read_indices,
    reading_segment,
    require_checksum,
    require_identity,
    require_steps,
)
from tda_lightning.stores.hdf5.stored_rows import StoredRows, require_unchanged, stamp_of
from tda_lightning.stores.integrity.damage import require_stored_bytes
from tda_lightning.stores.step import Step, StepFacts

_NO_BLOCK: tuple[range, list[Step]] = (range(0), [])


class Segment:
    """A sealed segment. Only the step indices are read before a step is accessed.

    The first access reads the facts of all steps and of all visits, in one go. The facts of the
    steps stay in memory, and :meth:`leave` decides on the rest.
    """

    def __init__(self, path: Path, expected: SegmentIdentity | None = None) -> None:
        self.path = path
        self._steps: StepColumns | None = None
        self._visits: VisitColumns | None = None
        self._is_kept = False
        self._block = _NO_BLOCK
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

    @property
    def steps(self) -> StepColumns:
        """The steps without their visits.

        Raises:
            StoreFileError: If the content has another checksum than when it was sealed; rows are
                checked when they are read.
        """
        steps = self._steps
        return self._read()[0] if steps is None else steps

    def visited_ids(self) -> Int[Tensor, " n"]:
        """Return the sorted ids of the samples in this segment."""
        ids: Tensor = torch.unique(self._read()[1].sample_ids)
        return ids

    def facts_at(self, position: int) -> StepFacts:
        """Return a step without its rows."""
        steps, visits = self._read()
        return steps.facts(position, visits.of_step(position))

    def step_at(self, position: int) -> Step:
        """Return a step; read its block unless it is in memory."""
        block, steps = self._block
        if position not in block:
            blocks = self.steps.blocks
            number = next(n for n, candidate in enumerate(blocks) if position in candidate)
            with reading_segment(self.path):
                block, steps = blocks[number], self._read_block(number)
            # Set both in one assignment: another thread may be reading too.
            self._block = (block, steps)
        return steps[position - block.start]

    def leave(self, room: int) -> int:
        """Free the memory of rows, and that of visits if they take more than ``room``.

        Returns:
            The number of bytes that are taken from now on.
        """
        self._block, visits = _NO_BLOCK, self._visits
        if self._is_kept or visits is None:
            return 0
        self._is_kept = visits.n_bytes <= room
        if not self._is_kept:
            self._visits = None
        return visits.n_bytes if self._is_kept else 0

    def _read(self) -> tuple[StepColumns, VisitColumns]:
        """Return the facts of the steps and of the visits; read them unless they are in memory."""
        steps, visits = self._steps, self._visits  # Other threads may change them.
        if steps is None or visits is None:
            with reading_segment(self.path):
                self._require_unchanged()
                if steps is None:  # Verify before anything else is read.
                    require_stored_bytes(self.path)
                    if self.header is not None:
                        require_checksum(self.path, self.header)
                with open_hdf5(self.path) as file:
                    names = VISIT_DATASETS | (STEP_DATASETS if steps is None else set())
                    datasets = read_datasets(file, names)
                    if steps is None:
                        steps = StepColumns(datasets, *self._rows(file, datasets))
                self._require_unchanged()
                visits = VisitColumns(datasets, steps)
            self._steps, self._visits = steps, visits
        return steps, visits

    def _rows(self, file: h5py.File, datasets: Datasets) -> Iterator[StoredRows]:
        """Yield the rows of the visits and those of sampled labels."""
        has_checksums = self.header is not None and self.header.crc32 is None
        checksums = datasets["blocks"].T[1:].tolist() if has_checksums else (None, None)
        for name, sums in zip(("visits", "curvature"), checksums, strict=True):
            yield StoredRows.of(self.path, file[name], self._stamp, sums)

    def _read_block(self, number: int) -> list[Step]:
        """Read the steps of a block; their rows are views of one tensor."""
        steps, visits = self._read()
        block, offset, curvature_offset = steps.blocks[number], steps.offset, steps.curvature_offset
        span, curvature_span = _span(offset, block), _span(curvature_offset, block)
        sketch = steps.sketch.read(span, visits.scales[span], number)
        scales = visits.curvature_scales[curvature_span]
        sampled = steps.curvature_rows.read(curvature_span, scales, number)
        return [
            Step.of(
                self.facts_at(position),
                sketch=_part(sketch, offset, block, position),
                curvature_rows=_if_any(_part(sampled, curvature_offset, block, position)),
            )
            for position in block
        ]

    def _require_unchanged(self) -> None:
        """Check that the file has not been replaced since it was opened."""
        require_unchanged(self.path, self._stamp, stamp_of(self.path))


def _span(offset: Sequence[int], block: range) -> slice:
    return slice(offset[block.start], offset[block.stop])


def _part(values: Tensor, offset: Sequence[int], block: range, position: int) -> Tensor:
    first = offset[block.start]
    return values[offset[position] - first : offset[position + 1] - first]


def _if_any(rows: Tensor) -> Tensor | None:
    return rows if len(rows) else None
