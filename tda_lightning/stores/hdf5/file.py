"""Open HDF5 files, without HDF5's own locks and with errors that name the file."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Literal

import h5py

from tda_lightning.stores.damage import reading
from tda_lightning.stores.hdf5.segment_header import HEADER_BYTES


def open_hdf5(path: Path, mode: Literal["r", "w"] = "r") -> h5py.File:
    """Open an HDF5 file, unlocked.

    A process that is forked while a segment is being written, such as a loader's worker, would
    inherit its lock and keep it, so that nobody could read the segment. No lock is needed: a
    segment is written under a temporary name, and never changes under its final name.
    """
    # The user block is for our header; see `segment_header`.
    block = HEADER_BYTES if mode == "w" else None
    return h5py.File(path, mode, locking=False, userblock_size=block)


def reading_segment(path: Path) -> AbstractContextManager[None]:
    """Turn every error inside the context into one that names the segment.

    Raises:
        StoreFileError: If anything goes wrong.
    """
    remedy = (
        "Restore it from a copy. Without one, record again, or use the steps before it, "
        "such as `run[:100]`"
    )
    return reading(path, "a segment of a run as it was sealed", f"{remedy}.")
