"""The HDF5 file of a segment: open it without HDF5's own locks, and check that its parts fit.

Errors name the file.
"""

from __future__ import annotations

from collections.abc import Sequence, Sized
from contextlib import AbstractContextManager
from itertools import pairwise
from pathlib import Path
from typing import Literal

import h5py

from tda_lightning.stores.hdf5.segment_header import HEADER_BYTES
from tda_lightning.stores.integrity.damage import reading

# A compressed dataset takes more memory than room in the file, but gzip gains no more than this.
_MAX_COMPRESSION = 1100
_MAX_UNSTORED_BYTES = 2**22


def open_hdf5(path: Path, mode: Literal["r", "w"] = "r") -> h5py.File:
    """Open an HDF5 file, unlocked.

    A process that is forked while a segment is being written, such as a loader's worker, would
    inherit and keep its lock. Then nobody could read the segment. No lock is needed: a segment is
    written under a temporary name, and never changes under its final name.
    """
    # The user block is for our header; see `segment_header`.
    block = HEADER_BYTES if mode == "w" else None
    return h5py.File(path, mode, locking=False, userblock_size=block)


def require_plain(file: h5py.File) -> None:
    """Check that a file holds all of its datasets, and no more than its size allows.

    A file from a stranger may link to other files, or claim a size that would fill the memory.

    Raises:
        ValueError: If it does not.
    """
    links: list[tuple[bytes, int]] = []
    file.id.links.visit(lambda name, link: links.append((name, link.type)), info=True)
    for name, kind in links:
        if kind != h5py.h5l.TYPE_HARD:
            raise ValueError(f"{name.decode()!r} is a link to another place, which is not followed")
        opened = h5py.h5o.open(file.id, name)
        if isinstance(opened, h5py.h5d.DatasetID):
            require_stored(name.decode(), opened)


def require_stored(name: str, dataset: h5py.h5d.DatasetID) -> None:
    """Check that a file holds a dataset, and that its size is not far beyond that of the file.

    Raises:
        ValueError: If it does not.
    """
    properties, stored = dataset.get_create_plist(), dataset.get_storage_size()
    if properties.get_layout() == h5py.h5d.VIRTUAL or properties.get_external_count():
        raise ValueError(f"{name!r} lies in other files, which are not read")
    size = dataset.get_type().get_size() * dataset.get_space().get_simple_extent_npoints()
    is_rows = name.endswith("/sketch")  # These are read block by block.
    if size > max(_MAX_UNSTORED_BYTES, _MAX_COMPRESSION * stored) and not (is_rows and stored):
        raise ValueError(f"{name!r} claims {size:,} bytes and stores {stored:,}")


def read_indices(file: h5py.File) -> list[int]:
    """Return the indices of the steps of a segment of which nothing has been checked yet.

    Raises:
        ValueError: If the file does not hold them, or they do not rise.
    """
    for path in ("steps", "steps/index"):
        if not isinstance(file.get(path, getlink=True), h5py.HardLink):
            raise ValueError(f"{path!r} is a link to another place, which is not followed")
    require_stored("steps/index", file["steps/index"].id)
    indices: list[int] = file["steps/index"][:].tolist()
    require_rising(indices)
    return indices


def reading_segment(path: Path) -> AbstractContextManager[None]:
    """Turn every error inside the context into one that names the segment.

    Raises:
        StoreFileError: If anything goes wrong.
    """
    remedy = (
        "Restore it from a copy. Without one, record again, or use the steps before it, "
        "such as `run[:100]`"
    )
    return reading(path, "an unchanged segment of a run", f"{remedy}.")


def require_rising(indices: Sequence[int]) -> None:
    """Check that steps come in order.

    >>> require_rising([4, 2])
    Traceback (most recent call last):
        ...
    ValueError: Step 2 comes after step 4; expected rising indices from 0.
    """
    if indices and indices[0] < 0:
        raise ValueError(f"The first step is {indices[0]}; expected rising indices from 0.")
    for before, after in pairwise(indices):
        if after <= before:
            raise ValueError(
                f"Step {after} comes after step {before}; expected rising indices from 0."
            )


def require_offsets(offset: Sequence[int], n_steps: int, n_rows: int) -> None:
    """Check that offsets divide rows among steps.

    >>> require_offsets([0, 5, 3], 2, 3)
    Traceback (most recent call last):
        ...
    ValueError: The offsets of 2 steps in 3 rows do not rise from 0 to 3.
    """
    is_rising = all(before <= after for before, after in pairwise(offset))
    if len(offset) != n_steps + 1 or offset[0] != 0 or offset[-1] != n_rows or not is_rising:
        raise ValueError(
            f"The offsets of {n_steps} steps in {n_rows} rows do not rise from 0 to {n_rows}."
        )


def require_lengths(expected: int, **columns: Sized) -> None:
    """Check that every column has the expected number of entries.

    >>> require_lengths(3, weight=[1.0, 2.0])
    Traceback (most recent call last):
        ...
    ValueError: `weight` has 2 entries; expected 3.
    """
    for name, column in columns.items():
        if len(column) != expected:
            raise ValueError(f"`{name}` has {len(column)} entries; expected {expected}.")
