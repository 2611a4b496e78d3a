"""Rows of a segment, read past HDF5 and verified block by block."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import get_args

import h5py
import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from tda_lightning.stores.hdf5.segment_file import open_hdf5
from tda_lightning.stores.integrity.damage import Checksum, StoreFileError, read_into
from tda_lightning.stores.row_formats import Storage, decode, decode_into, raw_bytes

Stamp = tuple[int, int]
# Rows, with the position of the first.
Part = tuple[int, np.ndarray]
# Small enough to stay in a processor's cache while rows are read, summed and decoded.
_PART_BYTES = 2**20


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
        count: Number of rows.
        width: Length of a row.
        offset: Position of the first byte in the file; ``None`` if the rows are not contiguous,
            such as in a file that a user has compressed.
        stamp: Stamp of the file when the dataset was inspected.
        checksums: Checksum of the encoded rows of each block; earlier segments have none.
        verified: Numbers of the blocks whose checksum was right when they were read first. Later
            reads only check the stamp.
    """

    path: Path
    name: str
    storage: Storage
    dtype: np.dtype
    count: int
    width: int
    offset: int | None
    stamp: Stamp
    checksums: Sequence[int] | None
    verified: set[int] = field(default_factory=set, compare=False)

    @classmethod
    def of(
        cls, path: Path, group: h5py.Group, stamp: Stamp, checksums: Sequence[int] | None = None
    ) -> StoredRows:
        """Return the rows of a group in a file with the given stamp and checksums."""
        dataset, storage = group["sketch"], group.attrs["storage"]
        if storage not in get_args(Storage):
            raise ValueError(f"'storage' is {str(storage)[:60]!r}; expected a known number format")
        return cls(
            path=path,
            name=dataset.name,
            storage=storage,
            dtype=dataset.dtype,
            count=len(dataset),
            width=dataset.shape[1],
            offset=dataset.id.get_offset(),
            stamp=stamp,
            checksums=checksums,
        )

    @property
    def row_bytes(self) -> int:
        """Number of bytes per row in the file."""
        return self.width * self.dtype.itemsize

    def read(
        self, span: slice, scales: Float[np.ndarray, " n"], block: int
    ) -> Float[Tensor, "n k"]:
        """Return the decoded rows of a block.

        Args:
            span: Slice of the rows.
            scales: Scale of each row.
            block: Number of the block.

        Raises:
            StoreFileError: If the file has changed.
            ValueError: If the rows have another checksum than when they were sealed.
        """
        count = span.stop - span.start
        rows = torch.empty(0, self.width)
        parts = self._read_encoded(span)
        if self.checksums is not None and block not in self.verified:
            parts = self._verified(parts, block)
        for start, encoded in parts:
            if len(encoded) == count:
                rows = decode(encoded, scales, self.storage)
                continue
            if start == 0:
                dtype = decode(encoded[:0], scales[:0], self.storage).dtype
                rows = torch.empty(count, self.width, dtype=dtype)
            place = slice(start, start + len(encoded))
            decode_into(rows[place], encoded, scales[place], self.storage)
        return rows

    def _verified(self, parts: Iterator[Part], block: int) -> Iterator[Part]:
        """Yield parts of a block; check their sum at the end."""
        assert self.checksums is not None
        checksum = Checksum()
        for start, encoded in parts:
            checksum.add(raw_bytes(encoded))
            yield start, encoded
        if checksum.value != self.checksums[block]:
            raise ValueError(f"the rows of block {block} have another checksum")
        self.verified.add(block)

    def _read_encoded(self, span: slice) -> Iterator[Part]:
        """Yield encoded rows part by part; a part is overwritten by the next one."""
        count = span.stop - span.start
        if not count:  # Without rows, such as without sampled labels, nothing is read.
            yield 0, self._empty(0)
            return
        if self.offset is None:
            require_unchanged(self.path, self.stamp, stamp_of(self.path))
            with open_hdf5(self.path) as file:
                yield 0, file[self.name][span]
            return
        size = max(1, _PART_BYTES // self.row_bytes)
        memory = self._empty(min(size, count))
        # Bypass HDF5, whose calls would take longer than reading the bytes.
        with self.path.open("rb", buffering=0) as file:
            # In a new file under this name, other bytes would be at the offset.
            require_unchanged(self.path, self.stamp, stamp_of(file.fileno()))
            file.seek(self.offset + span.start * self.row_bytes)
            for start in range(0, count, size):
                part = memory[: count - start]
                if not read_into(raw_bytes(part), file):  # It was truncated after the check.
                    raise _changed_error(self.path)
                yield start, part

    def _empty(self, count: int) -> np.ndarray:
        return np.empty((count, self.width), self.dtype)
