"""Number formats of rows on disk.

Gradients span many orders of magnitude between samples and steps, but not within a row. So float16
and int8 store each row divided by its largest entry, together with that entry in float64. No row
that float32 can represent underflows.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

Storage = Literal["as computed", "float16", "bfloat16", "int8"]

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


def raw_bytes(array: np.ndarray) -> memoryview:
    """Return the bytes of an array, without a copy if it is contiguous."""
    return np.ascontiguousarray(array).data.cast("B") if array.size else memoryview(b"")


def encode(
    rows: Float[Tensor, "n k"], storage: Storage
) -> tuple[np.ndarray, Float[np.ndarray, " n"]]:
    """Return an array of encoded rows, and the scale of each row."""
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


def decode_into(
    rows: Float[Tensor, "n k"],
    stored: np.ndarray,
    scales: Float[np.ndarray, " n"],
    storage: Storage,
) -> None:
    """Write decoded rows into memory of the dtype that :func:`decode` returns."""
    if storage == "bfloat16":  # Converting while copying saves a pass.
        rows.copy_(torch.from_numpy(stored).view(torch.bfloat16))
    else:
        rows.copy_(decode(stored, scales, storage))


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
