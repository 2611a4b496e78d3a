"""Open HDF5 files without HDF5's own locks."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import h5py


def open_hdf5(path: Path, mode: Literal["r", "w"] = "r") -> h5py.File:
    """Open an HDF5 file, unlocked.

    A process that is forked while a segment is being written, such as a loader's worker, would
    inherit its lock and keep it, so that nobody could read the segment. No lock is needed: a
    segment is written under a temporary name, and never changes under its final name.
    """
    return h5py.File(path, mode, locking=False)
