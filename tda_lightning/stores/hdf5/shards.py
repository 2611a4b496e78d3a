"""Shards: what each process wrote of a run, and all of it as one sequence of steps."""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from tda_lightning.stores.hdf5 import OpenSegment, Segment
from tda_lightning.stores.step import Audit, Preconditioner, Step, StepFacts


class Shard:
    """Steps in the segments of one process; reading holds one of these open."""

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
        """Add a sealed segment behind the others."""
        self._starts.append(len(self))
        self._segments.append(segment)

    def read(self, position: int) -> Step:
        """Return the step at a position, together with its block if that is not at hand."""
        segment, place = self._opened_at(position)
        return segment.step_at(place)

    def facts_at(self, position: int) -> StepFacts:
        """Return what is known of the step at a position besides its rows."""
        segment, place = self._opened_at(position)
        return segment.facts_at(place)

    def preconditioner(self, position: int) -> Preconditioner | None:
        """Return the coordinates of a step, without reading any sketch."""
        for start, segment in zip(reversed(self._starts), reversed(self._segments), strict=True):
            found = segment.steps.preconditioner(position - start)
            if found is not None:
                return found
        return None

    def audits(self) -> list[Audit]:
        """Return all audits, in order, without reading any sketch."""
        return [audit for segment in self._segments for audit in segment.steps.audits.values()]

    def _opened_at(self, position: int) -> tuple[OpenSegment, int]:
        number = bisect.bisect_right(self._starts, position) - 1
        at_hand = self._open
        if at_hand is None or at_hand[0] != number:
            at_hand = self._open = (number, OpenSegment(self._segments[number]))
        return at_hand[1], position - self._starts[number]


class MergedShards:
    """The steps of which every process has sealed its part: those of equal index are one step.

    A part that was lost, with a process or a disk, takes the other parts of its step along.

    Args:
        shards: Of each process, at least one.
    """

    def __init__(self, shards: Sequence[Shard]) -> None:
        self._shards = shards
        places = [{index: place for place, index in enumerate(one.indices)} for one in shards]
        indices = sorted(set.intersection(*(set(one) for one in places)))
        self._places = [[one[index] for one in places] for index in indices]

    def __len__(self) -> int:
        """Return the number of steps."""
        return len(self._places)

    @property
    def segments(self) -> Sequence[Segment]:
        """The segments of all processes."""
        return [segment for shard in self._shards for segment in shard.segments]

    def read(self, position: int) -> Step:
        """Return the step at a position, with the visits of all processes."""
        parts = [shard.read(place) for shard, place in self._parts(position)]
        return Step.of(
            _merge(parts),
            sketch=torch.cat([part.sketch for part in parts]),
            curvature_rows=_cat_if_known([part.curvature_rows for part in parts]),
        )

    def facts_at(self, position: int) -> StepFacts:
        """Return what is known of a step besides its rows, with the visits of all processes."""
        return _merge([shard.facts_at(place) for shard, place in self._parts(position)])

    def preconditioner(self, position: int) -> Preconditioner | None:
        """Return the coordinates of a step: those of all processes are the same."""
        shard, place = self._parts(position)[0]
        return shard.preconditioner(place)

    def audits(self) -> list[Audit]:
        """Return all audits: those of all processes are the same."""
        return self._shards[0].audits()

    def _parts(self, position: int) -> list[tuple[Shard, int]]:
        return list(zip(self._shards, self._places[position], strict=True))


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
        terms=_cat_if_known([part.terms for part in parts]),
        curvature=_cat_if_known([part.curvature for part in parts]),
        preconditioner=first.preconditioner,
        loss=first.loss,
    )


def _cat_if_known(parts: Sequence[Tensor | None]) -> Tensor | None:
    known = [part for part in parts if part is not None]
    return torch.cat(known) if len(known) == len(parts) else None
