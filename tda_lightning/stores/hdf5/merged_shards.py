"""MergedShards: the segments of several processes as one sequence of steps."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tda_lightning.stores.hdf5.segment_reader import Segment, Shard
from tda_lightning.stores.step import OPTIONAL_FACTS, Audit, Preconditioner, Step, StepFacts


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
        **{
            name: _cat_if_complete([getattr(part, name) for part in parts])
            for name in OPTIONAL_FACTS
        },
        preconditioner=first.preconditioner,
        loss=first.loss,
    )


def _cat_if_complete(parts: Sequence[Tensor | None]) -> Tensor | None:
    tensors = [part for part in parts if part is not None]
    return torch.cat(tensors) if len(tensors) == len(parts) else None
