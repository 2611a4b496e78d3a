"""SegmentSink: the steps of one process, written to one segment after the other."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tda_lightning.stores.hdf5 import Segment, folder, write_segment
from tda_lightning.stores.hdf5.background_write import BackgroundWrite
from tda_lightning.stores.hdf5.listing import entry_of, kept_entries
from tda_lightning.stores.hdf5.segment_file import SegmentIdentity
from tda_lightning.stores.hdf5.shards import Shard
from tda_lightning.stores.hdf5.snapshot_files import drop_snapshots_after
from tda_lightning.stores.integrity.durable import make_durable
from tda_lightning.stores.integrity.manifest import append_entry, manifest_file, write_manifest
from tda_lightning.stores.row_formats import Storage, storage_for
from tda_lightning.stores.step import OPTIONAL_FACTS, Step

# Columns of a step's visits beside its rows.
_COLUMNS = ("sample_ids", "weights", *OPTIONAL_FACTS)


class StepBuffer:
    """Steps that wait to be written, with their tensors in reused memory.

    Fresh memory is expensive: the operating system provides and clears it page by page. A store
    that held every step's own tensors until they are written would pay this cost in every step.
    Even small tensors that stay, such as the ids of samples, would keep the large ones between them
    from being returned: a training of 600 steps grew by 160 MB instead of 40.

    Args:
        size: Capacity in bytes of rows.
        storage: Number format of the rows on disk. Rounding to bfloat16 while copying is faster
            than copying. The scales of other formats would take another pass.
    """

    def __init__(self, size: int, storage: Storage | None = None) -> None:
        self._size = size
        self._storage = storage
        self._rows: Tensor | None = None
        self._computed: torch.dtype | None = None  # the format of the steps' rows
        self._columns: dict[str, Tensor] = {}
        self._used = 0
        self.steps: list[Step] = []

    def has_room_for(self, step: Step) -> bool:
        """Return whether a step can be added; an empty buffer accepts a step of any size."""
        if not self.steps:
            return True
        first = self.steps[0]
        assert self._rows is not None
        is_alike = step.sketch.dtype == self._computed and len(step.groups) == len(first.groups)
        return is_alike and self._used + len(step.sketch) <= len(self._rows)

    def add(self, step: Step) -> None:
        """Add a step; its rows and the facts of its visits are copied."""
        if not self.steps:
            self._allocate(step.sketch)
        assert self._rows is not None
        place = slice(self._used, self._used + len(step.sketch))
        columns = {name: getattr(step, name) for name in _COLUMNS}
        facts: dict[str, Any] = {
            name: self._column(name, values)[place].copy_(values)
            for name, values in columns.items()
            if values is not None
        }
        sketch = self._rows[place].copy_(step.sketch)
        self._used = place.stop
        self.steps.append(replace(step, sketch=sketch, **facts))

    def is_full(self) -> bool:
        """Return whether at least 90 % of the capacity is used."""
        return self._rows is not None and self._used >= 0.9 * len(self._rows)

    def clear(self) -> None:
        """Remove the steps and retain the memory."""
        self.steps = []
        self._used = 0

    def _column(self, name: str, values: Tensor) -> Tensor:
        """Return the memory of a column, as long as the rows."""
        assert self._rows is not None
        column = self._columns.get(name)
        if column is None or len(column) != len(self._rows) or column.dtype != values.dtype:
            column = self._columns[name] = torch.empty(len(self._rows), dtype=values.dtype)
        return column

    def _allocate(self, rows: Tensor) -> None:
        n, k = rows.shape
        self._computed = rows.dtype
        is_rounded = storage_for(self._storage, rows.dtype) == "bfloat16"
        dtype = torch.bfloat16 if is_rounded else rows.dtype
        count = max(n, self._size // (k * dtype.itemsize))
        fits = self._rows is not None and self._rows.shape == (count, k)
        if self._rows is None or not fits or self._rows.dtype != dtype:
            self._rows = torch.empty(count, k, dtype=dtype)


@dataclass(frozen=True)
class _State:
    """What a sink is doing.

    Attributes:
        filling: The buffer of the steps to come.
        spare: The buffer being written, or one that is free.
        following: The segment to be written next.
        writing: The segment that is being written.
    """

    filling: StepBuffer
    spare: StepBuffer
    following: SegmentIdentity
    writing: BackgroundWrite[Segment] | None


class SegmentSink:
    """Buffers steps, and writes them to segments in the background.

    Args:
        storage: Number format of the rows on disk.
        segment_bytes: Seal when the buffered rows take this much memory.
        segment_seconds: Seal when the oldest buffered step is this old.
        permit: Raises if nothing may be written any more.
    """

    def __init__(
        self,
        storage: Storage | None,
        segment_bytes: int,
        segment_seconds: float,
        permit: Callable[[], None],
    ) -> None:
        self._path = Path()
        self._storage = storage
        self._segment_bytes = segment_bytes
        self._segment_seconds = segment_seconds
        self._permit = permit
        self._shard = Shard()
        filling, spare = (StepBuffer(segment_bytes, storage) for _ in range(2))
        self._state = _State(filling, spare, SegmentIdentity("", 0), None)
        self._buffered_since = 0.0

    def start_at(self, path: Path, identity: SegmentIdentity, shard: Shard) -> None:
        """Write a segment of the run in a folder next, and add it and later ones to a shard."""
        self._path, self._shard = path, shard
        self._state = replace(self._state, following=identity)

    def append(self, step: Step) -> None:
        """Buffer a step; start writing when the buffer is full or old."""
        if not self._buffer.has_room_for(step):
            self._start_writing()
        if not self._buffer.steps:
            self._buffered_since = time.monotonic()
        self._buffer.add(step)
        age = time.monotonic() - self._buffered_since
        if self._buffer.is_full() or age >= self._segment_seconds:
            self._start_writing()

    def seal(self) -> None:
        """Write the buffered steps to a new segment and wait until it is on disk."""
        if self._buffer.steps:
            self._start_writing()
        self.finish()

    def discard(self) -> None:
        """Forget the buffered steps."""
        self._buffer.clear()

    def finish(self) -> None:
        """Wait until the segment being written is on disk."""
        state = self._state
        if state.writing is None:
            return
        try:
            segment = state.writing.result()
        except OSError:  # A failed write leaves no gap.
            self._state = replace(state, following=state.following.shifted(-1), writing=None)
            raise
        self._shard.add(segment)
        self._state = replace(state, writing=None)

    @property
    def _buffer(self) -> StepBuffer:
        return self._state.filling

    def _start_writing(self) -> None:
        """Write the buffered steps in the background, one segment at a time."""
        self.finish()
        state = self._state
        state.spare.clear()
        write = BackgroundWrite(partial(self._write, state.filling.steps, state.following))
        # One assignment, before the thread starts: an exception from a signal handler, which may
        # come between any two lines, neither loses a step nor writes it twice.
        self._state = _State(state.spare, state.filling, state.following.shifted(1), write)
        write.start()

    def _write(self, steps: list[Step], identity: SegmentIdentity) -> Segment:
        """Write a segment, list it in the manifest, and return the object that reads it.

        Raises:
            OSError: If writing failed.
        """
        number, rank, ranks = identity.number, identity.rank, identity.ranks
        file = self._path / folder.segment_name(number, rank, ranks)
        try:
            self._permit()
            folder.require_recipe_file(self._path)
            write_segment(file, steps, self._storage, identity, self._permit)
        except OSError:
            raise
        except (
            Exception
        ) as error:  # h5py raises some system errors, such as a full disk, as others.
            raise OSError(f"writing `{file}` failed: {error}") from error
        segment = Segment(file, identity)
        append_entry(manifest_file(self._path, rank, ranks), entry_of(segment))
        return segment


def cut(
    path: Path,
    first: SegmentIdentity,
    index: int,
    storage: Storage | None,
    permit: Callable[[], None],
) -> tuple[Shard, SegmentIdentity]:
    """Drop the steps of one process from ``index`` on, and the snapshots after it.

    Args:
        path: Folder of the run.
        first: Identity of the first segment of that process.
        index: Index of the first step to drop.
        storage: Number format of rewritten rows.
        permit: Raises if nothing may be written any more.

    Returns:
        The steps that stay, and the identity of the segment to write next.
    """
    run, rank, ranks = first.run, first.rank, first.ranks
    manifest = manifest_file(path, rank, ranks)
    remaining = kept_entries(path, run, rank, ranks, index)
    permit()
    # List only the files that stay, before any other is deleted.
    write_manifest(manifest, remaining)
    # Delete from the end, so that an interruption leaves a run without gaps.
    for file in reversed(folder.segments_of(path, rank, ranks)):
        permit()
        _drop_from(file, index, storage, folder.identity_of(file, run, ranks))
    if rank == 0:
        drop_snapshots_after(path, index)
    make_durable(path)
    shard = Shard(folder.segments_of(path, rank, ranks), run, ranks)
    for segment in shard.segments:
        if folder.number_of(segment.path) not in remaining.segments:
            append_entry(manifest, entry_of(segment))
    # A lost segment keeps its number, so that the gap stays visible.
    numbers = {-1, *remaining.segments, *map(folder.number_of, shard.files)}
    return shard, first.shifted(max(numbers) + 1)


def _drop_from(file: Path, index: int, storage: Storage | None, identity: SegmentIdentity) -> None:
    """Drop the steps from ``index`` on: rewrite the segment, or delete it if none is left."""
    segment = Segment(file, identity)
    n_earlier = sum(step_index < index for step_index in segment.indices)
    if n_earlier == 0:
        file.unlink()
    elif n_earlier < len(segment):
        steps = [segment.step_at(position) for position in range(n_earlier)]
        write_segment(file, steps, storage, identity)
