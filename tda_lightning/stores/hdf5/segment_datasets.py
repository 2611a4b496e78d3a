"""Datasets of a segment: the number formats of its rows, and the facts of its steps.

Gradients span many orders of magnitude between samples and steps, but not within a row. So float16
and int8 store each row divided by its largest entry, together with that entry in float64. No row
that float32 can represent underflows.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

import h5py
import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from tda_lightning.stores.damage import StoreFileError
from tda_lightning.stores.hdf5.file import open_hdf5
from tda_lightning.stores.hdf5.segment_checks import require_lengths, require_offsets
from tda_lightning.stores.step import Audit, ParameterGroup, Preconditioner, StepFacts

Storage = Literal["as computed", "float16", "bfloat16", "int8"]
Stamp = tuple[int, int]
# The hyper-parameters of a group are stored under these names.
GROUP_FIELDS = tuple(field.name for field in fields(ParameterGroup))

_INT8_LIMIT = 127
_MIN_FLOAT32_SCALE = 1e-30


def storage_for(storage: Storage | None, dtype: torch.dtype) -> Storage:
    """Return the number format of rows that were computed in ``dtype``.

    By default it has their range: bfloat16 has that of float32, but not that of float64.
    """
    if storage is not None:
        return storage
    return "as computed" if dtype == torch.float64 else "bfloat16"


def bytes_of(storage: Storage | None, dtype: torch.dtype) -> int:
    """Return the number of bytes that ``storage`` uses per number computed in ``dtype``."""
    sizes = {"as computed": dtype.itemsize, "float16": 2, "bfloat16": 2, "int8": 1}
    return sizes[storage_for(storage, dtype)]


def encode(
    rows: Float[Tensor, "n k"], storage: Storage
) -> tuple[np.ndarray, Float[np.ndarray, " n"]]:
    """Return an array ``(n, k)`` of encoded rows, and the scale of each row.

    Args:
        rows: Computed rows.
        storage: Number format of the array.
    """
    if storage == "as computed":
        return rows.numpy(), np.ones(len(rows))
    if storage == "bfloat16":  # HDF5 has no such type: store the bits as integers.
        return rows.to(torch.bfloat16).view(torch.int16).numpy(), np.ones(len(rows))
    # Use NumPy: this runs in parallel to training, and a second pool of torch threads would compete
    # for the cores.
    values = rows.numpy()
    largest = np.abs(values).max(axis=1, initial=0.0)
    scales = np.where(largest == 0, 1.0, largest).astype(np.float64)
    # A row that is not finite has a scale that is not finite, so its decoded row is not finite.
    with np.errstate(invalid="ignore"):
        scaled = values / scales.astype(values.dtype)[:, None]
        if storage == "float16":
            return scaled.astype(np.float16), scales
        return np.nan_to_num(np.rint(scaled * _INT8_LIMIT)).astype(np.int8), scales / _INT8_LIMIT


def decode(
    stored: np.ndarray, scales: Float[np.ndarray, " n"], storage: Storage
) -> Float[Tensor, "n k"]:
    """Return decoded rows: in float32, or in the original dtype for ``"as computed"``."""
    rows = torch.from_numpy(stored)
    if storage == "as computed":
        return rows
    if storage == "bfloat16":
        return rows.view(torch.bfloat16).float()
    factors = torch.from_numpy(scales)[:, None]
    # Scales may underflow in float32 where the products do not.
    if bool((factors < _MIN_FLOAT32_SCALE).any()):
        return (rows * factors).float()
    return rows.float().mul_(factors.float())


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


class StepColumns:
    """The steps of a segment, without their visits.

    Args:
        path: Path of the segment.
        stamp: Stamp of the file when the run was opened.
    """

    def __init__(self, path: Path, stamp: Stamp) -> None:
        with open_hdf5(path) as file:
            steps = file["steps"]
            self._index = steps["index"][:].tolist()
            self._epoch = steps["epoch"][:].tolist()
            self._optimizer, self._loss = _strings(steps, "optimizer"), _strings(steps, "loss")
            self._groups = np.stack([_group_values(steps, name) for name in GROUP_FIELDS], -1)
            self.audits = _read_audits(file["audits"])
            self.preconditioners = _read_preconditioners(file["preconditioners"])
            self.offset: list[int] = steps["offset"][:].tolist()
            self.curvature_offset: list[int] = file["curvature/offset"][:].tolist()
            self.sketch = StoredRows.of(path, file["visits"], stamp)
            self.curvature_rows = StoredRows.of(path, file["curvature"], stamp)
            n_visits, n_curvature = len(file["visits/sketch"]), len(file["curvature/sketch"])
        require_offsets(self.offset, len(self._index), n_visits)
        require_offsets(self.curvature_offset, len(self._index), n_curvature)
        require_lengths(
            len(self._index), epoch=self._epoch, optimizer=self._optimizer, loss=self._loss
        )
        require_lengths(len(self._index), groups=self._groups)

    def preconditioner(self, position: int) -> Preconditioner | None:
        """Return the last preconditioner set in this segment at or before the position."""
        changes = [start for start in self.preconditioners if start <= position]
        return self.preconditioners[max(changes)] if changes else None

    def facts(self, position: int, visits: dict[str, Tensor]) -> StepFacts:
        """Return the facts of a step, given the available columns of its visits."""
        return StepFacts(
            index=self._index[position],
            epoch=self._epoch[position],
            optimizer=self._optimizer[position],
            groups=tuple(ParameterGroup(*values) for values in self._groups[position].tolist()),
            sample_ids=visits["sample_id"],
            weights=visits["weight"],
            audit=self.audits.get(position),
            terms=visits.get("terms"),
            curvature=visits.get("curvature"),
            preconditioner=self.preconditioners.get(position),
            loss=self._loss[position],
        )


# Segments of older versions lack these columns; zero means unknown.
_NEW_GROUP_FIELDS = {"share", "decoupled", "descent", "owner"}


def _group_values(group: h5py.Group, name: str) -> np.ndarray:
    is_missing = name in _NEW_GROUP_FIELDS and name not in group
    return np.zeros(group["lr"].shape) if is_missing else group[name][:]


def _strings(group: h5py.Group, name: str) -> list[str]:
    if name == "loss" and name not in group:  # In segments of older versions.
        return [""] * len(group["index"])
    return [sys.intern(word) for word in group[name].asstr()[:].tolist()]


def _read_preconditioners(group: h5py.Group) -> dict[int, Preconditioner]:
    rows, columns = torch.from_numpy(group["rows"][:]), torch.from_numpy(group["columns"][:])
    positions = group["step"][:]
    require_lengths(len(positions), rows=rows, columns=columns)
    return {
        int(position): Preconditioner(rows[number], columns[number])
        for number, position in enumerate(positions)
    }


def _read_audits(group: h5py.Group) -> dict[int, Audit]:
    names = ("gradient", "deviation", "left_out", "update")
    gradient, deviation, left_out, update = (group[name][:] for name in names)
    positions = group["step"][:]
    require_lengths(
        len(positions), gradient=gradient, deviation=deviation, left_out=left_out, update=update
    )
    return {
        int(position): Audit(
            torch.from_numpy(gradient[number]),
            torch.from_numpy(deviation[number]),
            float(left_out[number]),
            float(update[number]),
        )
        for number, position in enumerate(positions)
    }
