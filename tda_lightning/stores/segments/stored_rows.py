"""StoredRows: where rows lie in a file, and how they are kept there."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
from jaxtyping import Float
from torch import Tensor

from tda_lightning.stores.encoding import Storage, decode


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
    """

    path: Path
    name: str
    storage: Storage
    dtype: np.dtype
    width: int
    offset: int | None

    @classmethod
    def of(cls, path: Path, group: h5py.Group) -> StoredRows:
        """Find the rows of a group."""
        dataset = group["sketch"]
        return cls(
            path=path,
            name=dataset.name,
            storage=group.attrs["storage"],
            dtype=dataset.dtype,
            width=dataset.shape[1],
            offset=dataset.id.get_offset(),
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
            OSError: If the file ends before them.
        """
        return decode(self._stored(span), scales, self.storage)

    def _stored(self, span: slice) -> np.ndarray:
        count = span.stop - span.start
        if count and self.offset is None:
            with h5py.File(self.path, "r") as file:
                found: np.ndarray = file[self.name][span]
            return found
        # Past HDF5, whose calls would take longer than to read the bytes does.
        rows = np.empty((count, self.width), self.dtype)
        left = rows.data.cast("B") if count else memoryview(b"")
        with self.path.open("rb", buffering=0) as file:
            file.seek((self.offset or 0) + span.start * self.row_bytes)
            while left:
                read = file.readinto(left)
                if not read:
                    raise OSError(f"`{self.path}` ends within its rows; expected a whole segment.")
                left = left[read:]
        return rows
