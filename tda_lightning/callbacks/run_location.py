"""Where a run goes: the named folder, a numbered one beside it, or the trainer's log folder."""

from __future__ import annotations

import glob
import itertools
import os
import time
from collections.abc import Set
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

from tda_lightning.callbacks.lightning_trainer import Trainer, from_first_process
from tda_lightning.stores import HDF5Store, MemoryStore, WritableStore

Existing = Literal["refuse", "replace", "number"]
RUN_NAME = "run.tda"
# Another process may have made an empty folder for its run a moment ago.
_SECONDS_RESERVED = 60.0


class RunLocation:
    """Chooses the store of each training, before its first batch.

    Args:
        store: Folder to record into, a store, or ``None`` for the trainer's log folder.
        existing: What to do with a run that the training does not continue. By default, a named one
            is refused, and one in the log folder is left as it is, beside a numbered one.

    Attributes:
        name: Name of the requested store in checkpoints: the same for all numbers.
        existing: What to do with such a run.

    Raises:
        ValueError: If runs are to be numbered in a store that is no folder.
    """

    def __init__(self, store: str | Path | WritableStore | None, existing: Existing | None) -> None:
        named = store if store is None or isinstance(store, WritableStore) else HDF5Store(store)
        self._requested: WritableStore | None = named
        self.existing = existing or ("number" if store is None else "refuse")
        self.name = RUN_NAME if store is None else str(getattr(self._requested, "name", ""))
        self._temporary: TemporaryDirectory[str] | None = None
        is_folder = self._requested is None or isinstance(self._requested, HDF5Store)
        if self.existing == "number" and not is_folder:
            raise ValueError(
                f"`existing` is 'number', and `store` is a `{type(store).__name__}`; expected a "
                "folder, beside which others can be numbered. Pass a path, or an `HDF5Store`."
            )

    @property
    def initial(self) -> WritableStore:
        """The store before training begins."""
        return MemoryStore() if self._requested is None else self._requested

    def is_same_as(self, other: RunLocation) -> bool:
        """Return whether both record into the same store."""
        ours, theirs = self._requested, other._requested
        first, second = getattr(ours, "path", None), getattr(theirs, "path", None)
        if ours is theirs or first is None or second is None:
            return ours is theirs
        is_same: bool = os.path.realpath(first) == os.path.realpath(second)  # Behind links.
        return is_same

    def choose(self, trainer: Trainer, begun: Set[str]) -> WritableStore:
        """Return the store of the training that starts; all processes must call it.

        If one of the runs with the ids ``begun`` is found, the training continues it.
        """
        if getattr(trainer, "fast_dev_run", False):
            return self._temporary_store(trainer)
        store = self._requested
        if store is None:
            store = HDF5Store(_log_folder(trainer) / RUN_NAME)
        if self.existing != "number":
            return store
        assert isinstance(store, HDF5Store)
        first, run_ids = store.path, begun if trainer.global_step else set()
        path = from_first_process(trainer, lambda: _find(first, run_ids) or _reserve(first))
        return store if path == first else store.at(path)

    def _temporary_store(self, trainer: Trainer) -> WritableStore:
        """Return a store that leaves nothing on disk."""
        if not isinstance(self.initial, HDF5Store | MemoryStore):
            return self.initial  # A user's own store.
        if trainer.world_size == 1:
            return self.initial if isinstance(self.initial, MemoryStore) else MemoryStore()
        path = ""
        if trainer.is_global_zero:
            self._temporary = TemporaryDirectory(prefix="tda_lightning-")
            path = self._temporary.name
        return HDF5Store(Path(trainer.strategy.broadcast(path)))


def _log_folder(trainer: Trainer) -> Path:
    folder = str(trainer.log_dir or trainer.default_root_dir)
    if "://" in folder:
        raise ValueError(
            f"The log folder of the trainer is `{folder}`; expected a folder on disk. Name one: "
            "`GradientRecorder('run.tda')`."
        )
    return Path(folder)


def _find(path: Path, run_ids: Set[str]) -> Path | None:
    """Return the path of a run by its id, or ``None`` if it is not there."""
    if not run_ids:
        return None
    others = path.parent.glob(f"{glob.escape(path.stem)}-*{glob.escape(path.suffix)}")
    return next((each for each in (path, *others) if _run_id(each) in run_ids), None)


def _run_id(path: Path) -> str | None:
    try:
        return HDF5Store(path).run_id
    except (OSError, ValueError):  # Another run may be damaged.
        return None


def _reserve(path: Path) -> Path:
    """Make an empty folder at the path, or at the first of ``run-2.tda``, ... that is free."""
    for number in itertools.count(1):
        candidate = path if number == 1 else path.with_name(f"{path.stem}-{number}{path.suffix}")
        try:
            candidate.mkdir(parents=True)
            break
        except FileExistsError:
            if _is_old_and_empty(candidate):
                break
    return candidate


def _is_old_and_empty(path: Path) -> bool:
    age = time.time() - path.stat().st_mtime
    return path.is_dir() and not any(path.iterdir()) and age > _SECONDS_RESERVED
