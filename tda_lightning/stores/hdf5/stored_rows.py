"""StoredRows: read the rows of an HDF5 dataset, past h5py where possible."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
from jaxtyping import Float
from torch import Tensor

from tda_lightning.stores.damage import StoreFileError
from tda_lightning.stores.hdf5.encoding import Storage, decode
from tda_lightning.stores.hdf5.file import open_hdf5

Stamp = tuple[int, int]


def stamp_of(file: Path | int) -> Stamp:
    """Return the size and modification time of a file, given as a path or a descriptor."""
    status = os.stat(file)
    return status.st_size, status.st_mtime_ns


def require_unchanged(path: Path, expected: Stamp, stamp: Stamp) -> None:
    """Check that a sealed file has not been replaced or modified.

    Raises:
        StoreFileError: If the stamps differ.
    """
    if stamp != expected:
        raise _changed_error(path)


def _changed_error(path: Path) -> StoreFileError:
    return StoreFileError(
        f"`{path}` has changed since the run was opened; expected a sealed segment, which never "
        "changes. If training was resumed meanwhile, open the run again; else restore the file."
    )


@dataclass(frozen=True)
class StoredRows:
    """The rows of one dataset.

    Attributes:
        path: Path of the segment.
        name: Name of the dataset.
        storage: Number format of the encoded rows.
        dtype: NumPy dtype of the dataset.
        width: Length of a row.
        offset: Position of the first byte in the file; ``None`` if the rows are not contiguous,
            such as in a file that a user has compressed.
        stamp: Stamp of the file when the dataset was inspected.
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
        """Return the rows of a group in a file with the given stamp."""
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
        """Number of bytes per row in the file."""
        return self.width * self.dtype.itemsize

    def read(self, span: slice, scales: Float[np.ndarray, " n"]) -> Float[Tensor, "n k"]:
        """Return some decoded rows.

        Args:
            span: Slice of the rows.
            scales: Scale of each row.

        Raises:
            StoreFileError: If the file has changed.
        """
        return decode(self._read_encoded(span), scales, self.storage)

    def _read_encoded(self, span: slice) -> np.ndarray:
        count = span.stop - span.start
        if count and self.offset is None:
            require_unchanged(self.path, self.stamp, stamp_of(self.path))
            with open_hdf5(self.path) as file:
                encoded: np.ndarray = file[self.name][span]
            return encoded
        # Bypass HDF5, whose calls would take longer than reading the bytes.
        rows = np.empty((count, self.width), self.dtype)
        remaining = rows.data.cast("B") if count else memoryview(b"")
        with self.path.open("rb", buffering=0) as file:
            # In a new file under this name, other bytes would be at the offset.
            require_unchanged(self.path, self.stamp, stamp_of(file.fileno()))
            file.seek((self.offset or 0) + span.start * self.row_bytes)
            while remaining:
                n_bytes = file.readinto(remaining)
                if not n_bytes:  # The file was truncated after the check.
                    raise _changed_error(self.path)
                remaining = remaining[n_bytes:]
        return rows
