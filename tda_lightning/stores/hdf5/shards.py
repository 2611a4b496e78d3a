"""Shards: the segments of one process, and those of all processes together."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from tda_lightning.stores.hdf5.folder import identity_of
from tda_lightning.stores.hdf5.segment_reader import Segment
from tda_lightning.stores.integrity.damage import StoreFileError
from tda_lightning.stores.step import OPTIONAL_FACTS, Audit, Preconditioner, Step, StepFacts

# Visits of the segments that stay in memory, in the whole run: those of a million visits or more.
_MAX_VISIT_BYTES = 2**26


class Shard:
    """Steps in the segments of one process.

    Segments stay in memory without their rows, as far as there is room: methods pass over a run
    several times, and opening a small segment takes longer than reading its rows.
    """

    def __init__(self, files: Sequence[Path] = (), run: str = "", ranks: int = 1) -> None:
        self._parts: list[tuple[int, Segment]] = []  # each with the position of its first step
        self._current: Segment | None = None
        self._room = _MAX_VISIT_BYTES // ranks
        for file in files:
            segment = Segment(file, identity_of(file, run, ranks))
            self._require_order(segment)
            self.add(segment)

    def __len__(self) -> int:
        start, last = self._parts[-1] if self._parts else (0, ())
        return start + len(last)

    @property
    def segments(self) -> Sequence[Segment]:
        """The segments, in order."""
        return [segment for _, segment in self._parts]

    @property
    def files(self) -> list[Path]:
        """The files of the segments, in order."""
        return [segment.path for segment in self.segments]

    @property
    def indices(self) -> list[int]:
        """Index of every step: the number of optimizer steps taken before it."""
        return [index for segment in self.segments for index in segment.indices]

    def add(self, segment: Segment) -> None:
        """Append a sealed segment, unless it is the last one already."""
        if not self._parts or self._parts[-1][1] is not segment:
            self._parts.append((len(self), segment))

    def read(self, position: int) -> Step:
        """Return the step at a position; read its block unless it is in memory."""
        number, offset = self._locate(position)
        return self._at(number).step_at(offset)

    def facts_at(self, position: int) -> StepFacts:
        """Return the step at a position without its rows."""
        number, offset = self._locate(position)
        return self._at(number).facts_at(offset)

    def preconditioner(self, position: int) -> Preconditioner | None:
        """Return the coordinates of a step, without reading any sketch."""
        last, _ = self._locate(position)
        for number in range(last, -1, -1):
            offset = position - self._parts[number][0]
            preconditioner = self._at(number).steps.preconditioner(offset)
            if preconditioner is not None:
                return preconditioner
        return None

    def audits(self) -> list[Audit]:
        """Return all audits, in order, without reading any sketch."""
        return [audit for segment in self._pass() for audit in segment.steps.audits.values()]

    def visited_ids(self) -> Iterator[Int[Tensor, " n"]]:
        """Yield the ids of the visited samples, segment by segment."""
        return (segment.visited_ids() for segment in self._pass())

    def _pass(self) -> Iterator[Segment]:
        return map(self._at, range(len(self._parts)))

    def _require_order(self, segment: Segment) -> None:
        before = self._parts[-1][1] if self._parts else None
        if before is None or not before.indices or not segment.indices:
            return
        last, first = before.indices[-1], segment.indices[0]
        if first <= last:
            raise StoreFileError(
                f"`{segment.path}` begins with step {first}, but `{before.path.name}` before "
                f"it ends with step {last}; expected later steps. One of them was swapped, "
                "copied or written by another training. Restore the files from a copy."
            )

    def _locate(self, position: int) -> tuple[int, int]:
        """Return the number of a step's segment, and the step's position in it."""
        number = bisect.bisect_right(self._parts, position, key=itemgetter(0)) - 1
        return number, position - self._parts[number][0]

    def _at(self, number: int) -> Segment:
        """Return a segment to read from; free memory of the one before."""
        segment, before = self._parts[number][1], self._current
        if before is not None and before is not segment:
            self._room -= before.leave(self._room)
        self._current = segment
        return segment


class MergedShards:
    """The steps that every process has sealed; parts with equal index form one step.

    If a process or a disk loses its part of a step, the whole step is left out.
    """

    def __init__(self, shards: Sequence[Shard]) -> None:
        self._shards = shards
        lookups = [{index: n for n, index in enumerate(shard.indices)} for shard in shards]
        indices = sorted(set.intersection(*(set(lookup) for lookup in lookups)))
        # For every merged step, its position in each shard.
        self._positions = [[lookup[index] for lookup in lookups] for index in indices]

    def __len__(self) -> int:
        return len(self._positions)

    def visited_ids(self) -> Iterator[Int[Tensor, " n"]]:
        """Yield the ids of the visited samples, segment by segment."""
        return itertools.chain(*(shard.visited_ids() for shard in self._shards))

    def read(self, position: int) -> Step:
        """Return the step at a position, with the visits of all processes."""
        parts = [shard.read(local) for shard, local in self._parts(position)]
        return replace(
            parts[0],
            **_merged_visits(parts),
            sketch=torch.cat([part.sketch for part in parts]),
            curvature_rows=_cat_if_complete([part.curvature_rows for part in parts]),
        )

    def facts_at(self, position: int) -> StepFacts:
        """Return a step without its rows, with the visits of all processes."""
        parts = [shard.facts_at(local) for shard, local in self._parts(position)]
        return replace(parts[0], **_merged_visits(parts))

    def preconditioner(self, position: int) -> Preconditioner | None:
        """Return the coordinates of a step, which are the same in all processes."""
        shard, local = self._parts(position)[0]
        return shard.preconditioner(local)

    def audits(self) -> list[Audit]:
        """Return all audits, which are the same in all processes."""
        return self._shards[0].audits()

    def _parts(self, position: int) -> list[tuple[Shard, int]]:
        return list(zip(self._shards, self._positions[position], strict=True))


def _merged_visits(parts: Sequence[StepFacts]) -> dict[str, Any]:
    """Return the facts of the visits of all parts, without their rows."""
    names = ("sample_ids", "weights", *OPTIONAL_FACTS)
    return {name: _cat_if_complete([getattr(part, name) for part in parts]) for name in names}


def _cat_if_complete(parts: Sequence[Tensor | None]) -> Tensor | None:
    tensors = [part for part in parts if part is not None]
    return torch.cat(tensors) if len(tensors) == len(parts) else None
