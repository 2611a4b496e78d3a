"""HDF5Store: a run in a folder of sealed HDF5 segments that survive a killed process."""

from __future__ import annotations

import os
import time
from functools import cached_property, partial
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Int
from torch import Tensor

from tda_lightning.arguments import require_choice, require_not_negative, require_whole
from tda_lightning.stores.durable import absolute_path, make_durable
from tda_lightning.stores.hdf5 import Segment, folder
from tda_lightning.stores.hdf5.background_write import BackgroundWrite, write_and_open
from tda_lightning.stores.hdf5.buffer import StepBuffer
from tda_lightning.stores.hdf5.merged_shards import MergedShards
from tda_lightning.stores.hdf5.segment_header import SegmentIdentity
from tda_lightning.stores.hdf5.segment_reader import Shard
from tda_lightning.stores.hdf5.snapshot_files import (
    drop_snapshots_after,
    indices_in,
    read_snapshot,
    snapshot_file,
    write_snapshot,
)
from tda_lightning.stores.hdf5.truncation import drop_from
from tda_lightning.stores.recipe import Recipe
from tda_lightning.stores.row_formats import Storage, bytes_of
from tda_lightning.stores.step import Audit, Preconditioner, Step, StepFacts
from tda_lightning.stores.store import Weights, WritableStore, require_snapshot


class HDF5Store(WritableStore):
    """A run in a folder.

    Reading holds one block of steps in memory: at most 1 MB on disk, or one step. It also holds
    about 30 bytes per visit of the current segment.

    Writing buffers steps and seals them into files that never change. It seals when the buffer is
    full or old, and in :meth:`seal`. If the process is killed, every sealed step stays readable and
    complete. Several processes can write one run: each writes separate segments, and a step can be
    read once all have sealed their part of it.

    Args:
        path: The folder. ``~`` is expanded, and a relative path is resolved at once.
        storage: Number format of the rows on disk. By default, it is bfloat16 for rows in float32
            and float64 for those of models in double precision, so that no row leaves its range.
            Rounding to bfloat16, float16 or int8 loses far less accuracy than sketching. ``"as
            computed"`` is float32 or float64.
        segment_bytes: Seal when the buffered rows take this much memory.
        segment_seconds: Seal when the oldest buffered step is this old.

    Attributes:
        path: The absolute path of the folder.
        name: The path before it was made absolute; it identifies the store in checkpoints.

    Raises:
        ValueError: If an argument is invalid.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        storage: Storage | None = None,
        segment_bytes: int = 16 * 2**20,
        segment_seconds: float = 20.0,
    ) -> None:
        if not isinstance(path, str | os.PathLike):
            raise ValueError(
                f"`path` is {path!r}; expected the path of a folder, such as 'run.tda'."
            )
        if storage is not None:
            require_choice("storage", storage, Storage)
        require_whole("segment_bytes", segment_bytes, least=1)
        require_not_negative("segment_seconds", segment_seconds)
        self.path = absolute_path(path)
        self.name = os.fspath(path)
        self._storage = storage
        self._segment_bytes = segment_bytes
        self._segment_seconds = segment_seconds
        self._recipe: Recipe | None = None
        self._run = ""  # id of the run that is written
        # A training goes on even if its run has lost a segment.
        self._missing: Literal["refuse", "skip"] = "skip"
        self._rank, self._ranks = 0, 1
        self._shard = Shard()
        self._merged: MergedShards | None = None
        self._next = 0  # number of the next segment
        self._writing: BackgroundWrite[Segment] | None = None
        self._buffered_since = 0.0

    @classmethod
    def open(cls, path: str | Path, *, missing: Literal["refuse", "skip"] = "refuse") -> HDF5Store:
        """Open a run, even while it is being recorded; later steps need :meth:`refresh`.

        Args:
            path: The folder.
            missing: What to do if a segment between two others has been lost.

        Raises:
            FileNotFoundError: If the folder does not exist.
            StoreFileError: If a file is damaged or missing.
            ValueError: If the path is not a run, or a run of another format.
        """
        require_choice("missing", missing, Literal["refuse", "skip"])
        store = cls(path)
        store._missing = missing
        store._recipe = folder.read_recipe(store.path)
        store._ranks = store._recipe.ranks
        store.refresh()
        return store

    @property
    def recipe(self) -> Recipe:
        """How the sketches were made."""
        if self._recipe is None:
            self._recipe = folder.read_recipe(self.path)
        return self._recipe

    @property
    def run_id(self) -> str | None:
        """Unique id of the run in the folder."""
        return folder.read_run_id(self.path)

    @property
    def size_on_disk(self) -> int:
        """Number of bytes of the run's files."""
        return sum(file.stat().st_size for file in self._files())

    def bytes_of(self, dtype: torch.dtype) -> int:
        """Return the number of bytes on disk per row entry that was computed in ``dtype``."""
        return bytes_of(self._storage, dtype)

    def __len__(self) -> int:
        """Return the number of steps that every process has sealed."""
        return len(self._steps)

    def read(self, position: int) -> Step:
        """Return the step at a position; read its block unless it is cached."""
        return self._steps.read(position)

    def facts_at(self, position: int) -> StepFacts:
        """Return the step at a position without reading its rows."""
        return self._steps.facts_at(position)

    def visited_ids(self) -> Int[Tensor, " n"]:
        """Return the sorted ids of the visited samples, without reading any sketch."""
        parts = [segment.visited_ids() for segment in self._steps.segments]
        ids: Tensor = torch.unique(torch.cat([torch.empty(0, dtype=torch.int64), *parts]))
        return ids

    def preconditioner(self, position: int = -1) -> Preconditioner | None:
        """Return the coordinates of the rows of a step, without reading any sketch."""
        return self._steps.preconditioner(range(len(self))[position])

    def audits(self) -> list[Audit]:
        """Return the audits of the run, without reading any sketch."""
        return self._steps.audits()

    def join(self, rank: int, ranks: int) -> None:
        """Write as one of several processes."""
        self._rank, self._ranks = rank, ranks

    def begin(self, recipe: Recipe) -> None:
        """Start a new run in an empty or new folder."""
        self._run = folder.write_recipe(self.path, recipe)
        self._recipe = recipe
        self._shard, self._merged, self._next = Shard(), None, 0

    def amend(self, recipe: Recipe) -> None:
        """Replace the recipe of a run that has no steps yet."""
        if self._rank == 0:
            folder.amend_recipe(self.path, recipe)
        self._recipe = recipe

    def resume(self, index: int) -> None:
        """Continue the stored run at the optimizer step ``index``."""
        self._finish_writing()
        self._buffer.clear()
        self._recipe, self._run = folder.read_recipe(self.path), self.run_id or ""
        # Delete from the end, so that an interruption leaves a run without gaps.
        for file in reversed(folder.segments_of(self.path, self._rank, self._ranks)):
            drop_from(file, index, self._storage, self._identity(file))
        if self._rank == 0:
            drop_snapshots_after(self.path, index)
        make_durable(self.path)
        # Other processes may still be changing their segments: `refresh` reads those later.
        files = folder.segments_of(self.path, self._rank, self._ranks)
        self._shard = Shard(files, self._run, self._ranks)
        self._merged, self._next = None, folder.next_number(self._shard.files)

    def clear(self) -> None:
        """Delete the files of the run, and nothing else in the folder."""
        folder.require_clearable(self.path)
        # Delete the recipe last, so that an interrupted `clear` can be repeated.
        for file in sorted(self._files(), key=lambda file: file.name == folder.RECIPE):
            file.unlink()
        self._recipe = None
        self._buffer.clear()
        self.refresh()

    def snapshots(self) -> list[int]:
        """Return the indices of the steps with a snapshot, in order."""
        return indices_in(self.path)

    def weights_at(self, index: int) -> Weights:
        """Return the stored model state before a step."""
        require_snapshot(self.snapshots(), index)
        return read_snapshot(self.path, index)

    def keep_weights(self, index: int, weights: Weights) -> None:
        """Store the model state before a step, in a separate file."""
        write_snapshot(self.path, index, weights)

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
        self._finish_writing()

    def refresh(self) -> None:
        """Load the sealed segments of all processes."""
        files = [folder.segments_of(self.path, rank, self._ranks) for rank in range(self._ranks)]
        if self._missing == "refuse":
            for rank_files in files:
                folder.require_no_gaps(rank_files)
        self._run = self.run_id or ""
        shards = [Shard(rank_files, self._run, self._ranks) for rank_files in files]
        self._shard = shards[self._rank]
        self._merged = MergedShards(shards) if self._ranks > 1 else None
        self._next = folder.next_number(self._shard.files)

    @property
    def _steps(self) -> Shard | MergedShards:
        return self._shard if self._merged is None else self._merged

    @cached_property
    def _buffers(self) -> list[StepBuffer]:
        """The buffer being filled and the one being written; a store that only reads has none."""
        return [StepBuffer(self._segment_bytes, self._storage) for _ in range(2)]

    @property
    def _buffer(self) -> StepBuffer:
        return self._buffers[0]

    def _start_writing(self) -> None:
        """Write the buffered steps in the background, one segment at a time."""
        self._finish_writing()
        file = self.path / folder.segment_name(self._next, self._rank, self._ranks)
        # An exception may come between any two of these lines, from a signal handler: the write is
        # registered before its thread starts, and a second call repeats it at worst.
        write = partial(
            write_and_open, file, self._buffer.steps, self._storage, self._identity(file)
        )
        self._writing = BackgroundWrite(write)
        self._buffers[1].clear()
        self._buffers.reverse()
        self._next += 1
        self._writing.start()

    def _finish_writing(self) -> None:
        if self._writing is None:
            return
        try:
            segment = self._writing.result()
        except OSError:
            self._writing = None
            self._next -= 1  # A failed write leaves no gap.
            raise
        self._writing = None
        self._shard.add(segment)

    def _identity(self, file: Path) -> SegmentIdentity:
        return folder.identity_of(file, self._run, self._ranks)

    def _files(self) -> list[Path]:
        others = [*self.path.glob(folder.PARTIAL), *self.path.glob(folder.RECIPE)]
        snapshots = [snapshot_file(self.path, index) for index in indices_in(self.path)]
        return [*folder.all_segments(self.path), *snapshots, *others]
