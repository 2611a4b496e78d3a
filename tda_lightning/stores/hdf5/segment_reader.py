"""Reading a segment: what its steps were, all at once; their rows, block by block."""

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

from tda_lightning.stores.hdf5.segment_writer import GROUP_FIELDS
from tda_lightning.stores.hdf5.stored_rows import (
    Stamp,
    StoredRows,
    require_unchanged,
    stamp_of,
)
from tda_lightning.stores.step import Audit, ParameterGroup, Preconditioner, Step, StepFacts

# Small enough to stay in a processor's cache, from the disk to the first product.
_BLOCK_BYTES = 2**20


class Segment:
    """A sealed segment. Of its steps, only how many there are is known before one is asked for.

    Args:
        path: The file.
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
        """All that is known of the steps without their visits."""
        found = StepColumns(self.path, self._stamp)
        self.require_unchanged()
        return found

    def require_unchanged(self) -> None:
        """Raise if another file has taken its place.

        Raises:
            OSError: Saying so.
        """
        require_unchanged(self.path, self._stamp, stamp_of(self.path))

    def visited_ids(self) -> Int[Tensor, " n"]:
        """Return the ids of the samples in this segment, sorted."""
        with h5py.File(self.path, "r") as file:
            ids: Tensor = torch.unique(torch.from_numpy(file["visits/sample_id"][:]))
        return ids


class StepColumns:
    """The steps of a segment, without their visits.

    Args:
        path: The file.
        stamp: What it had when the run was opened.
    """

    def __init__(self, path: Path, stamp: Stamp) -> None:
        with h5py.File(path, "r") as file:
            steps = file["steps"]
            self._index = steps["index"][:].tolist()
            self._epoch = steps["epoch"][:].tolist()
            self._optimizer, self._loss = _words(steps, "optimizer"), _words(steps, "loss")
            self._hyper = np.stack([_hyper(steps, name) for name in GROUP_FIELDS], -1)
            self.audits = _read_audits(file["audits"])
            self.preconditioners = _read_preconditioners(file["preconditioners"])
            self.offset: list[int] = steps["offset"][:].tolist()
            self.curvature_offset: list[int] = file["curvature/offset"][:].tolist()
            self.sketch = StoredRows.of(path, file["visits"], stamp)
            self.curvature_rows = StoredRows.of(path, file["curvature"], stamp)

    def preconditioner(self, place: int) -> Preconditioner | None:
        """Return the last one that began at this place or before it, in this segment."""
        begun = [one for one in self.preconditioners if one <= place]
        return self.preconditioners[max(begun)] if begun else None

    def facts(self, place: int, visits: dict[str, Tensor]) -> StepFacts:
        """Return what is known of a step, given the columns of its visits that are known."""
        return StepFacts(
            index=self._index[place],
            epoch=self._epoch[place],
            optimizer=self._optimizer[place],
            groups=tuple(ParameterGroup(*values) for values in self._hyper[place].tolist()),
            sample_ids=visits["sample_id"],
            weights=visits["weight"],
            audit=self.audits.get(place),
            terms=visits.get("terms"),
            curvature=visits.get("curvature"),
            preconditioner=self.preconditioners.get(place),
            loss=self._loss[place],
        )


class OpenSegment:
    """A segment at hand: its visits, without their rows, and one block of steps with theirs.

    Args:
        segment: Which.
    """

    def __init__(self, segment: Segment) -> None:
        self._columns = segment.steps
        with h5py.File(segment.path, "r") as file:
            visits = {name: file["visits"][name][:] for name in _COLUMNS}
            self._scales = file["visits/scale"][:]
            self._curvature_scales = file["curvature/scale"][:]
        segment.require_unchanged()
        offset = self._columns.offset
        self._visits = {name: torch.from_numpy(values) for name, values in visits.items()}
        self._known = {name: _known(values, offset) for name, values in visits.items()}
        self._blocks = split(offset, max(1, _BLOCK_BYTES // self._columns.sketch.row_bytes))
        self._at_hand: tuple[range, list[Step]] = (range(0), [])

    def facts_at(self, place: int) -> StepFacts:
        """Return what is known of a step besides its rows."""
        own = slice(self._columns.offset[place], self._columns.offset[place + 1])
        known = {name: one[own] for name, one in self._visits.items() if self._known[name][place]}
        return self._columns.facts(place, known)

    def step_at(self, place: int) -> Step:
        """Return a step, together with its block if that is not at hand."""
        block, steps = self._at_hand
        if place not in block:
            block = next(one for one in self._blocks if place in one)
            # Both at once: another thread may be reading too.
            steps = self._read(block)
            self._at_hand = (block, steps)
        return steps[place - block.start]

    def _read(self, block: range) -> list[Step]:
        """Read consecutive steps; their rows share one piece of memory."""
        offset, curvature_offset = self._columns.offset, self._columns.curvature_offset
        visits, curvature = _span(offset, block), _span(curvature_offset, block)
        sketch = self._columns.sketch.read(visits, self._scales[visits])
        sampled = self._columns.curvature_rows.read(curvature, self._curvature_scales[curvature])
        return [
            Step.of(
                self.facts_at(place),
                sketch=_part(sketch, offset, block, place),
                curvature_rows=_if_any(_part(sampled, curvature_offset, block, place)),
            )
            for place in block
        ]


_COLUMNS = ("sample_id", "weight", "terms", "curvature")


def split(offset: Sequence[int], visits_per_block: int) -> list[range]:
    """Cut steps into runs of at most ``visits_per_block`` visits, or of one step."""
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


def _part(values: Tensor, offset: Sequence[int], block: range, place: int) -> Tensor:
    first = offset[block.start]
    return values[offset[place] - first : offset[place + 1] - first]


def _known(values: np.ndarray, offset: Sequence[int]) -> list[bool]:
    """Say of every step whether a column holds something of all its visits."""
    gaps = np.concatenate([[0], np.isnan(values).cumsum()])
    known: list[bool] = (np.diff(gaps[offset]) == 0).tolist()
    return known


def _if_any(rows: Tensor) -> Tensor | None:
    return rows if len(rows) else None


def _hyper(group: h5py.Group, name: str) -> np.ndarray:
    # Segments of older runs lack some columns: zeros, for what is not known.
    return group[name][:] if name in group else np.zeros(group["lr"].shape)


def _words(group: h5py.Group, name: str) -> list[str]:
    if name not in group:
        return [""] * len(group["index"])
    return [sys.intern(word) for word in group[name].asstr()[:].tolist()]


def _read_preconditioners(group: h5py.Group) -> dict[int, Preconditioner]:
    rows, columns = torch.from_numpy(group["rows"][:]), torch.from_numpy(group["columns"][:])
    return {
        int(place): Preconditioner(rows[number], columns[number])
        for number, place in enumerate(group["step"][:])
    }


def _read_audits(group: h5py.Group) -> dict[int, Audit]:
    names = ("gradient", "deviation", "left_out", "update")
    gradient, deviation, left_out, update = (group[name][:] for name in names)
    return {
        int(place): Audit(
            torch.from_numpy(gradient[number]),
            torch.from_numpy(deviation[number]),
            float(left_out[number]),
            float(update[number]),
        )
        for number, place in enumerate(group["step"][:])
    }
