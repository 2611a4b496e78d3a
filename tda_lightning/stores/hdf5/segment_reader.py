"""Read steps from segments: of one file, of one process, and merged over processes.

The facts of all steps of a segment are read at once, their rows block by block.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import h5py
import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from tda_lightning.stores.hdf5.segment_datasets import StepColumns, require_unchanged, stamp_of
from tda_lightning.stores.step import Audit, Preconditioner, Step, StepFacts

# Small enough to stay in a processor's cache between the disk and the first product.
_BLOCK_BYTES = 2**20


class Segment:
    """A sealed segment. Only the step indices are read before a step is accessed.

    Args:
        path: Path of the segment.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._stamp = stamp_of(path)
        with h5py.File(path, "r") as file:
            self.indices: list[int] = file["steps/index"][:].tolist()

    def __len__(self) -> int:
        """Return the number of steps."""
        return len(self.indices)

    @cached_property
    def steps(self) -> StepColumns:
        """The steps without their visits."""
        columns = StepColumns(self.path, self._stamp)
        self.require_unchanged()
        return columns

    def require_unchanged(self) -> None:
        """Check that the file has not been replaced.

        Raises:
            OSError: If the file has changed since it was opened.
        """
        require_unchanged(self.path, self._stamp, stamp_of(self.path))

    def visited_ids(self) -> Int[Tensor, " n"]:
        """Return the sorted ids of the samples in this segment."""
        with h5py.File(self.path, "r") as file:
            ids: Tensor = torch.unique(torch.from_numpy(file["visits/sample_id"][:]))
        return ids


class OpenSegment:
    """A segment in memory: all visits without rows, and one block of steps with rows.

    Args:
        segment: The segment to open.
    """

    def __init__(self, segment: Segment) -> None:
        self._columns = segment.steps
        with h5py.File(segment.path, "r") as file:
            visits = {name: file["visits"][name][:] for name in _VISIT_COLUMNS}
            self._scales = file["visits/scale"][:]
            self._curvature_scales = file["curvature/scale"][:]
        segment.require_unchanged()
        offset = self._columns.offset
        self._visits = {name: torch.from_numpy(values) for name, values in visits.items()}
        self._is_complete = {name: _is_complete(values, offset) for name, values in visits.items()}
        self._blocks = split(offset, max(1, _BLOCK_BYTES // self._columns.sketch.row_bytes))
        self._cached: tuple[range, list[Step]] = (range(0), [])

    def facts_at(self, position: int) -> StepFacts:
        """Return a step without its rows."""
        span = slice(self._columns.offset[position], self._columns.offset[position + 1])
        visits = {
            name: values[span]
            for name, values in self._visits.items()
            if self._is_complete[name][position]
        }
        return self._columns.facts(position, visits)

    def step_at(self, position: int) -> Step:
        """Return a step; read its block unless it is cached."""
        block, steps = self._cached
        if position not in block:
            block = next(candidate for candidate in self._blocks if position in candidate)
            steps = self._read(block)
            # Set both in one assignment: another thread may be reading too.
            self._cached = (block, steps)
        return steps[position - block.start]

    def _read(self, block: range) -> list[Step]:
        """Read consecutive steps; their rows are views of one tensor."""
        offset, curvature_offset = self._columns.offset, self._columns.curvature_offset
        visits, curvature = _span(offset, block), _span(curvature_offset, block)
        sketch = self._columns.sketch.read(visits, self._scales[visits])
        sampled = self._columns.curvature_rows.read(curvature, self._curvature_scales[curvature])
        return [
            Step.of(
                self.facts_at(position),
                sketch=_part(sketch, offset, block, position),
                curvature_rows=_if_any(_part(sampled, curvature_offset, block, position)),
            )
            for position in block
        ]


_VISIT_COLUMNS = ("sample_id", "weight", "terms", "curvature")


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


def _span(offset: Sequence[int], block: range) -> slice:
    return slice(offset[block.start], offset[block.stop])


def _part(values: Tensor, offset: Sequence[int], block: range, position: int) -> Tensor:
    first = offset[block.start]
    return values[offset[position] - first : offset[position + 1] - first]


def _is_complete(values: np.ndarray, offset: Sequence[int]) -> list[bool]:
    """Return for every step whether the column has a value for all its visits."""
    n_missing = np.concatenate([[0], np.isnan(values).cumsum()])
    complete: list[bool] = (np.diff(n_missing[offset]) == 0).tolist()
    return complete


def _if_any(rows: Tensor) -> Tensor | None:
    return rows if len(rows) else None


class Shard:
    """Steps in the segments of one process; reading keeps one segment open."""

    def __init__(self, files: Sequence[Path] = ()) -> None:
        self._segments: list[Segment] = []
        self._starts: list[int] = []
        self._open: tuple[int, OpenSegment] | None = None
        for file in files:
            self.add(Segment(file))

    def __len__(self) -> int:
        """Return the number of steps."""
        return self._starts[-1] + len(self._segments[-1]) if self._segments else 0

    @property
    def segments(self) -> Sequence[Segment]:
        """The segments, in order."""
        return self._segments

    @property
    def indices(self) -> list[int]:
        """Index of every step: the number of optimizer steps taken before it."""
        return [index for segment in self._segments for index in segment.indices]

    def add(self, segment: Segment) -> None:
        """Append a sealed segment."""
        self._starts.append(len(self))
        self._segments.append(segment)

    def read(self, position: int) -> Step:
        """Return the step at a position; read its block unless it is cached."""
        segment, offset = self._locate(position)
        return segment.step_at(offset)

    def facts_at(self, position: int) -> StepFacts:
        """Return the step at a position without its rows."""
        segment, offset = self._locate(position)
        return segment.facts_at(offset)

    def preconditioner(self, position: int) -> Preconditioner | None:
        """Return the coordinates of a step, without reading any sketch."""
        for start, segment in zip(reversed(self._starts), reversed(self._segments), strict=True):
            preconditioner = segment.steps.preconditioner(position - start)
            if preconditioner is not None:
                return preconditioner
        return None

    def audits(self) -> list[Audit]:
        """Return all audits, in order, without reading any sketch."""
        return [audit for segment in self._segments for audit in segment.steps.audits.values()]

    def _locate(self, position: int) -> tuple[OpenSegment, int]:
        """Return the open segment of a step, and the step's position in it."""
        number = bisect.bisect_right(self._starts, position) - 1
        current = self._open
        if current is None or current[0] != number:
            current = self._open = (number, OpenSegment(self._segments[number]))
        return current[1], position - self._starts[number]


class MergedShards:
    """The steps that every process has sealed; parts with equal index form one step.

    If a process or a disk loses its part of a step, the whole step is left out.

    Args:
        shards: The shards of all processes, at least one.
    """

    def __init__(self, shards: Sequence[Shard]) -> None:
        self._shards = shards
        lookups = [{index: n for n, index in enumerate(shard.indices)} for shard in shards]
        indices = sorted(set.intersection(*(set(lookup) for lookup in lookups)))
        # For every merged step, its position in each shard.
        self._positions = [[lookup[index] for lookup in lookups] for index in indices]

    def __len__(self) -> int:
        """Return the number of steps."""
        return len(self._positions)

    @property
    def segments(self) -> Sequence[Segment]:
        """The segments of all processes."""
        return [segment for shard in self._shards for segment in shard.segments]

    def read(self, position: int) -> Step:
        """Return the step at a position, with the visits of all processes."""
        parts = [shard.read(local) for shard, local in self._parts(position)]
        return Step.of(
            _merge(parts),
            sketch=torch.cat([part.sketch for part in parts]),
            curvature_rows=_cat_if_complete([part.curvature_rows for part in parts]),
        )

    def facts_at(self, position: int) -> StepFacts:
        """Return a step without its rows, with the visits of all processes."""
        return _merge([shard.facts_at(local) for shard, local in self._parts(position)])

    def preconditioner(self, position: int) -> Preconditioner | None:
        """Return the coordinates of a step, which are the same in all processes."""
        shard, local = self._parts(position)[0]
        return shard.preconditioner(local)

    def audits(self) -> list[Audit]:
        """Return all audits, which are the same in all processes."""
        return self._shards[0].audits()

    def _parts(self, position: int) -> list[tuple[Shard, int]]:
        return list(zip(self._shards, self._positions[position], strict=True))


def _merge(parts: Sequence[StepFacts]) -> StepFacts:
    first = parts[0]
    return StepFacts(
        index=first.index,
        epoch=first.epoch,
        optimizer=first.optimizer,
        groups=first.groups,
        sample_ids=torch.cat([part.sample_ids for part in parts]),
        weights=torch.cat([part.weights for part in parts]),
        audit=first.audit,
        terms=_cat_if_complete([part.terms for part in parts]),
        curvature=_cat_if_complete([part.curvature for part in parts]),
        preconditioner=first.preconditioner,
        loss=first.loss,
    )


def _cat_if_complete(parts: Sequence[Tensor | None]) -> Tensor | None:
    tensors = [part for part in parts if part is not None]
    return torch.cat(tensors) if len(tensors) == len(parts) else None
