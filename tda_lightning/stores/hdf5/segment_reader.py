"""Read a segment: the facts of all its steps at once, their rows block by block."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import h5py
import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from tda_lightning.stores.hdf5.file import open_hdf5, reading_segment
from tda_lightning.stores.hdf5.segment_checks import (
    require_lengths,
    require_offsets,
    require_rising,
)
from tda_lightning.stores.hdf5.segment_header import (
    SegmentIdentity,
    read_header,
    require_checksum,
    require_identity,
    require_steps,
)
from tda_lightning.stores.hdf5.segment_writer import GROUP_FIELDS
from tda_lightning.stores.hdf5.stored_rows import (
    Stamp,
    StoredRows,
    require_unchanged,
    stamp_of,
)
from tda_lightning.stores.step import Audit, ParameterGroup, Preconditioner, Step, StepFacts

# Small enough to stay in a processor's cache between the disk and the first product.
_BLOCK_BYTES = 2**20


class Segment:
    """A sealed segment. Only the step indices are read before a step is accessed.

    Args:
        path: Path of the segment.
        expected: Which segment it should be, if known.
    """

    def __init__(self, path: Path, expected: SegmentIdentity | None = None) -> None:
        self.path = path
        with reading_segment(path):
            self._stamp = stamp_of(path)
            self.header = read_header(path)
            with open_hdf5(path) as file:
                self.indices: list[int] = file["steps/index"][:].tolist()
            require_rising(self.indices)
            if self.header is not None:
                require_steps(self.header, self.indices)
                require_identity(self.header, expected or self.header.identity)

    def __len__(self) -> int:
        """Return the number of steps."""
        return len(self.indices)

    @cached_property
    def steps(self) -> StepColumns:
        """The steps without their visits."""
        with reading_segment(self.path):
            assert self.is_verified is not None  # Verify before anything else is read.
            columns = StepColumns(self.path, self._stamp)
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
            if self.header is not None:
                require_checksum(self.path, self.header)
        return self.header is not None

    def require_unchanged(self) -> None:
        """Check that the file has not been replaced.

        Raises:
            StoreFileError: If the file has changed since it was opened.
        """
        with reading_segment(self.path):
            require_unchanged(self.path, self._stamp, stamp_of(self.path))

    def visited_ids(self) -> Int[Tensor, " n"]:
        """Return the sorted ids of the samples in this segment."""
        assert self.is_verified is not None
        with reading_segment(self.path), open_hdf5(self.path) as file:
            ids: Tensor = torch.unique(torch.from_numpy(file["visits/sample_id"][:]))
        return ids


class StepColumns:
    """The steps of a segment, without their visits.

    Args:
        path: Path of the segment.
        stamp: Stamp of the file when the run was opened.
    """

    def __init__(self, path: Path, stamp: Stamp) -> None:
        with open_hdf5(path) as file:
            steps = file["steps"]
            self._index = steps["index"][:].tolist()
            self._epoch = steps["epoch"][:].tolist()
            self._optimizer, self._loss = _strings(steps, "optimizer"), _strings(steps, "loss")
            self._groups = np.stack([_group_values(steps, name) for name in GROUP_FIELDS], -1)
            self.audits = _read_audits(file["audits"])
            self.preconditioners = _read_preconditioners(file["preconditioners"])
            self.offset: list[int] = steps["offset"][:].tolist()
            self.curvature_offset: list[int] = file["curvature/offset"][:].tolist()
            self.sketch = StoredRows.of(path, file["visits"], stamp)
            self.curvature_rows = StoredRows.of(path, file["curvature"], stamp)
            n_visits, n_curvature = len(file["visits/sketch"]), len(file["curvature/sketch"])
        require_offsets(self.offset, len(self._index), n_visits)
        require_offsets(self.curvature_offset, len(self._index), n_curvature)
        require_lengths(
            len(self._index), epoch=self._epoch, optimizer=self._optimizer, loss=self._loss
        )
        require_lengths(len(self._index), groups=self._groups)

    def preconditioner(self, position: int) -> Preconditioner | None:
        """Return the last preconditioner set in this segment at or before the position."""
        changes = [start for start in self.preconditioners if start <= position]
        return self.preconditioners[max(changes)] if changes else None

    def facts(self, position: int, visits: dict[str, Tensor]) -> StepFacts:
        """Return the facts of a step, given the available columns of its visits."""
        return StepFacts(
            index=self._index[position],
            epoch=self._epoch[position],
            optimizer=self._optimizer[position],
            groups=tuple(ParameterGroup(*values) for values in self._groups[position].tolist()),
            sample_ids=visits["sample_id"],
            weights=visits["weight"],
            audit=self.audits.get(position),
            terms=visits.get("terms"),
            curvature=visits.get("curvature"),
            preconditioner=self.preconditioners.get(position),
            loss=self._loss[position],
        )


class OpenSegment:
    """A segment in memory: all visits without rows, and one block of steps with rows.

    Args:
        segment: The segment to open.
    """

    def __init__(self, segment: Segment) -> None:
        self._path = segment.path
        self._columns = segment.steps
        offset, curvature_offset = self._columns.offset, self._columns.curvature_offset
        with reading_segment(segment.path):
            with open_hdf5(segment.path) as file:
                visits = {name: file["visits"][name][:] for name in _VISIT_COLUMNS}
                self._scales = file["visits/scale"][:]
                self._curvature_scales = file["curvature/scale"][:]
            segment.require_unchanged()
            require_lengths(offset[-1], **visits, scale=self._scales)
            require_lengths(curvature_offset[-1], scale=self._curvature_scales)
        self._visits = {name: torch.from_numpy(values) for name, values in visits.items()}
        self._is_known = {name: _is_known(visits[name], offset) for name in _OPTIONAL_COLUMNS}
        self._blocks = split(offset, max(1, _BLOCK_BYTES // self._columns.sketch.row_bytes))
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
            block = next(candidate for candidate in self._blocks if position in candidate)
            steps = self._read(block)
            # Set both in one assignment: another thread may be reading too.
            self._cached = (block, steps)
        return steps[position - block.start]

    def _read(self, block: range) -> list[Step]:
        """Read consecutive steps; their rows are views of one tensor."""
        with reading_segment(self._path):
            return self._read_block(block)

    def _read_block(self, block: range) -> list[Step]:
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


_OPTIONAL_COLUMNS = ("terms", "curvature")
_VISIT_COLUMNS = ("sample_id", "weight", *_OPTIONAL_COLUMNS)


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


def _is_known(values: np.ndarray, offset: Sequence[int]) -> list[bool]:
    """Return for every step whether the column was recorded; NaN in all visits means unknown."""
    # Some values may be NaN in a recorded column: those of samples whose loss is not finite.
    n_missing = np.concatenate([[0], np.isnan(values).cumsum()])
    n_visits = np.diff(offset)
    known: list[bool] = ((np.diff(n_missing[offset]) < n_visits) | (n_visits == 0)).tolist()
    return known


def _if_any(rows: Tensor) -> Tensor | None:
    return rows if len(rows) else None


# Segments of older versions lack these columns; zero means unknown.
_NEW_GROUP_FIELDS = {"share", "decoupled", "descent", "owner"}


def _group_values(group: h5py.Group, name: str) -> np.ndarray:
    is_missing = name in _NEW_GROUP_FIELDS and name not in group
    return np.zeros(group["lr"].shape) if is_missing else group[name][:]


def _strings(group: h5py.Group, name: str) -> list[str]:
    if name == "loss" and name not in group:  # In segments of older versions.
        return [""] * len(group["index"])
    return [sys.intern(word) for word in group[name].asstr()[:].tolist()]


def _read_preconditioners(group: h5py.Group) -> dict[int, Preconditioner]:
    rows, columns = torch.from_numpy(group["rows"][:]), torch.from_numpy(group["columns"][:])
    positions = group["step"][:]
    require_lengths(len(positions), rows=rows, columns=columns)
    return {
        int(position): Preconditioner(rows[number], columns[number])
        for number, position in enumerate(positions)
    }


def _read_audits(group: h5py.Group) -> dict[int, Audit]:
    names = ("gradient", "deviation", "left_out", "update")
    gradient, deviation, left_out, update = (group[name][:] for name in names)
    positions = group["step"][:]
    require_lengths(
        len(positions), gradient=gradient, deviation=deviation, left_out=left_out, update=update
    )
    return {
        int(position): Audit(
            torch.from_numpy(gradient[number]),
            torch.from_numpy(deviation[number]),
            float(left_out[number]),
            float(update[number]),
        )
        for number, position in enumerate(positions)
    }
