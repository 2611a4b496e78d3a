"""HDF5Store: a run in a folder of sealed HDF5 segments that survive a killed process."""

from __future__ import annotations

import os
import uuid
from functools import cached_property, partial
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Int
from torch import Tensor

from tda_lightning.stores.arguments import (
    absolute_path,
    require_choice,
    require_not_negative,
    require_whole,
)
from tda_lightning.stores.hdf5 import folder
from tda_lightning.stores.hdf5.listing import first_manifest, read_shards
from tda_lightning.stores.hdf5.segment_file import SegmentIdentity
from tda_lightning.stores.hdf5.segment_sink import SegmentSink, cut
from tda_lightning.stores.hdf5.shards import MergedShards, Shard
from tda_lightning.stores.hdf5.snapshot_files import (
    indices_in,
    read_snapshot,
    require_snapshots,
    write_snapshot,
)
from tda_lightning.stores.integrity.durable import writing_to
from tda_lightning.stores.integrity.manifest import (
    EndEntry,
    Manifest,
    append_entry,
    manifest_file,
    write_manifest,
)
from tda_lightning.stores.integrity.writer_lock import WriterLock
from tda_lightning.stores.recipe import Recipe
from tda_lightning.stores.row_formats import Storage, bytes_of
from tda_lightning.stores.step import Audit, Preconditioner, Step, StepFacts
from tda_lightning.stores.store import Weights, require_snapshot
from tda_lightning.stores.writable_store import WritableStore


class HDF5Store(WritableStore):
    """A run in a folder.

    Reading holds one block of steps in memory: at most 1 MB on disk, or one step. It also holds the
    facts of visits without their rows, up to 64 MiB, and those of the current segment.

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
        at: Creates a store with the same settings at another path.

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
            raise ValueError(f"`path` is {path!r}; expected the path of a folder, as 'run.tda'.")
        if storage is not None:
            require_choice("storage", storage, Storage)
        require_whole("segment_bytes", segment_bytes, least=1)
        require_not_negative("segment_seconds", segment_seconds)
        self.path = absolute_path(path)
        self.name = os.fspath(path)
        self.at = partial(
            HDF5Store, storage=storage, segment_bytes=segment_bytes, segment_seconds=segment_seconds
        )
        self._storage = storage
        self._recipe: Recipe | None = None
        self._run = ""  # id of the run that is read or written
        self._is_cleared = False
        # A training goes on even if its run has lost a segment.
        self._missing: Literal["refuse", "skip"] = "skip"
        self._rank, self._ranks = 0, 1
        self._shard = Shard()
        self._merged: MergedShards | None = None
        self._limits = segment_bytes, segment_seconds

    @classmethod
    def open(cls, path: str | Path, *, missing: Literal["refuse", "skip"] = "refuse") -> HDF5Store:
        """Open a run, even while it is being recorded; later steps need :meth:`refresh`.

        Args:
            path: The folder.
            missing: What to do if a segment between two others has been lost.

        Raises:
            FileNotFoundError: If the folder does not exist.
            StoreFileError: If a file is damaged or missing.
            ValueError: If the path is not a run of this format.
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
        return sum(file.stat().st_size for file in folder.files_of(self.path))

    def bytes_of(self, dtype: torch.dtype) -> int:
        """Return the number of bytes on disk per row entry that was computed in ``dtype``."""
        return bytes_of(self._storage, dtype)

    def __len__(self) -> int:
        return len(self._steps)

    def read(self, position: int) -> Step:
        """Return the step at a position; read its block unless it is cached."""
        step = self._steps.read(position)
        return step.with_curvature() if self.recipe.curvature == "fisher" else step

    def facts_at(self, position: int) -> StepFacts:
        """Return the step at a position without reading its rows."""
        return self._steps.facts_at(position)

    def visited_ids(self) -> Int[Tensor, " n"]:
        """Return the sorted ids of the visited samples, without reading any sketch."""
        none = torch.empty(0, dtype=torch.int64)
        ids: Tensor = torch.unique(torch.cat([none, *self._steps.visited_ids()]))
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
        if not self._is_cleared:  # After it, the user's other files may be left.
            folder.prepare(self.path)
        run = uuid.uuid4().hex
        with writing_to(self.path), self._lock.acquired(self.path, run):
            folder.write_recipe(self.path, run, recipe)
            write_manifest(self._manifest_file, Manifest(run))
        self._recipe, self._run, self._shard, self._merged = recipe, run, Shard(), None
        self._sink.start_at(self.path, self._identity(0), self._shard)

    def amend(self, recipe: Recipe) -> None:
        """Replace the recipe of a run; once it has steps, ids and names may be added."""
        self._lock.require()
        if self._rank == 0:
            folder.amend_recipe(self.path, recipe)
        self._recipe = recipe

    def resume(self, index: int) -> None:
        """Continue the stored run at the optimizer step ``index``."""
        self._sink.finish()
        self._sink.discard()
        self._recipe, self._run = folder.read_recipe(self.path), self.run_id or ""
        if self._rank == 0:
            self._lock.acquire(self.path, self._run)
        else:
            self._lock.join(self.path)
        # Other processes may still be changing their segments: `refresh` reads those later.
        self._shard, following = cut(
            self.path, self._identity(0), index, self._storage, self._lock.require
        )
        self._merged = None
        self._sink.start_at(self.path, following, self._shard)

    def clear(self) -> None:
        """Delete the files of the run, and nothing else in the folder."""
        folder.require_clearable(self.path)
        if self.path.exists():
            with self._lock.held(self.path, self._run):
                folder.delete_run(self.path)
            self._lock.release()
            self._is_cleared = True
        self._recipe, self._run, self._shard, self._merged = None, "", Shard(), None
        self._sink.discard()

    def renew(self) -> None:
        """Show other trainings that this one is alive."""
        self._lock.renew()

    def release(self) -> None:
        """Let other trainings write to the run."""
        self._lock.release()

    def snapshots(self) -> list[int]:
        """Return the indices of the steps with a snapshot, in order."""
        indices = indices_in(self.path)
        if self._missing == "refuse":
            require_snapshots(self.path, indices, self._manifest())
        return indices

    def weights_at(self, index: int) -> Weights:
        """Return the stored model state before a step."""
        require_snapshot(self.snapshots(), index)
        manifest = self._manifest()
        entry = None if manifest is None else manifest.snapshots.get(index)
        return read_snapshot(self.path, index, entry)

    def keep_weights(self, index: int, weights: Weights) -> None:
        """Store the model state before a step, in a separate file."""
        with self._lock.held(self.path, self._run):
            write_snapshot(self.path, index, weights, self._manifest_file, self._lock.require)

    def keep_fingerprint(self, fingerprint: str) -> None:
        """Store the fingerprint of the weights at the end of the training."""
        with self._lock.held(self.path, self._run):
            append_entry(self._manifest_file, EndEntry(fingerprint))

    @property
    def final_fingerprint(self) -> str | None:
        """Fingerprint of the weights at the end of the training, if known."""
        manifest = self._manifest()
        return None if manifest is None else manifest.weights or None

    def append(self, step: Step) -> None:
        """Buffer a step; start writing when the buffer is full or old."""
        self._lock.renew()
        self._sink.append(step)

    def seal(self) -> None:
        """Write the buffered steps to a new segment and wait until it is on disk."""
        self._lock.renew()
        self._sink.seal()

    def refresh(self) -> None:
        """Load the sealed segments of all processes."""
        self._run = self.run_id or ""
        shards = read_shards(self.path, self._run, self._ranks, self._missing)
        self._shard = shards[self._rank]
        self._merged = MergedShards(shards) if self._ranks > 1 else None

    @cached_property
    def _lock(self) -> WriterLock:
        return WriterLock()

    @cached_property
    def _sink(self) -> SegmentSink:
        return SegmentSink(self._storage, *self._limits, permit=self._lock.require)

    @property
    def _steps(self) -> Shard | MergedShards:
        return self._shard if self._merged is None else self._merged

    @property
    def _manifest_file(self) -> Path:
        return manifest_file(self.path, self._rank, self._ranks)

    def _manifest(self) -> Manifest | None:
        """Return the manifest that lists the snapshots."""
        return first_manifest(self.path, self.run_id or "", self._ranks, self._missing)

    def _identity(self, number: int) -> SegmentIdentity:
        return SegmentIdentity(self._run, number, self._rank, self._ranks)
