"""StoredRows: where rows lie in a file, and how they are kept there."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
from jaxtyping import Float
from torch import Tensor

from tda_lightning.stores.hdf5.encoding import Storage, decode

Stamp = tuple[int, int]


def stamp_of(file: Path | int) -> Stamp:
    """Return what changes if a file, or what is open as one, is not what it was."""
    found = os.stat(file)
    return found.st_size, found.st_mtime_ns


def require_unchanged(path: Path, expected: Stamp, found: Stamp) -> None:
    """Raise if a sealed file has become another.

    Raises:
        OSError: Saying what may have happened, and what to do.
    """
    if found != expected:
        raise _changed(path)


def _changed(path: Path) -> OSError:
    return OSError(
        f"`{path}` has changed since the run was opened; expected a sealed segment, which never "
        "does. If training was resumed meanwhile, open the run again; else restore the file."
    )


@dataclass(frozen=True)
class StoredRows:
    """The rows of one dataset.

    Attributes:
        path: The file.
        name: Name of the dataset.
        storage: Number format.
        dtype: What the file holds.
        width: Length of a row.
        offset: The first byte in the file; ``None`` where only HDF5 knows its way, as it does in a
            file that was packed anew by somebody.
        stamp: The file's, when this was found out.
    """

    path: Path
    name: str
    storage: Storage
    dtype: np.dtype
    width: int
    offset: int | None
    stamp: Stamp

    @classmethod
    def of(cls, path: Path, group: h5py.Group, stamp: Stamp) -> StoredRows:
        """Find the rows of a group of a file that had a stamp."""
        dataset = group["sketch"]
        return cls(
            path=path,
            name=dataset.name,
            storage=group.attrs["storage"],
            dtype=dataset.dtype,
            width=dataset.shape[1],
            offset=dataset.id.get_offset(),
            stamp=stamp,
        )

    @property
    def row_bytes(self) -> int:
        """How many bytes of the file a row takes."""
        return self.width * self.dtype.itemsize

    def read(self, span: slice, scales: Float[np.ndarray, " n"]) -> Float[Tensor, "n k"]:
        """Return some rows as numbers to calculate with.

        Args:
            span: Which rows.
            scales: What to multiply each with.

        Raises:
            OSError: If the file is not what it was.
        """
        return decode(self._stored(span), scales, self.storage)

    def _stored(self, span: slice) -> np.ndarray:
        count = span.stop - span.start
        if count and self.offset is None:
            require_unchanged(self.path, self.stamp, stamp_of(self.path))
            with h5py.File(self.path, "r") as file:
                found: np.ndarray = file[self.name][span]
            return found
        # Past HDF5, whose calls would take longer than to read the bytes does.
        rows = np.empty((count, self.width), self.dtype)
        left = rows.data.cast("B") if count else memoryview(b"")
        with self.path.open("rb", buffering=0) as file:
            # What was put in its place would have other bytes there.
            require_unchanged(self.path, self.stamp, stamp_of(file.fileno()))
            file.seek((self.offset or 0) + span.start * self.row_bytes)
            while left:
                read = file.readinto(left)
                if not read:  # It was cut off at this moment.
                    raise _changed(self.path)
                left = left[read:]
        return rows
