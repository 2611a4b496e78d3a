"""Encoding: rows in fewer bytes than they were computed in.

Gradients span many orders of magnitude from one sample and one step to the next, but not within a
row. So float16 and int8 keep each row divided by its largest entry, and that entry beside it in
float64: no row that float32 can hold underflows, however small it is.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

Storage = Literal["as computed", "float16", "bfloat16", "int8"]

_INT8_LIMIT = 127
_SMALLEST = 1e-30


def bytes_of(storage: Storage, dtype: torch.dtype) -> int:
    """Return how many bytes a number takes that was computed in ``dtype``."""
    return {"as computed": dtype.itemsize, "float16": 2, "bfloat16": 2, "int8": 1}[storage]


def encode(
    rows: Float[Tensor, "n k"], storage: Storage
) -> tuple[np.ndarray, Float[np.ndarray, " n"]]:
    """Return what to write: an array of ``(n, k)`` numbers, and a scale for each row.

    Args:
        rows: Rows as they were computed.
        storage: Number format to write.
    """
    if storage == "as computed":
        return rows.numpy(), np.ones(len(rows))
    if storage == "bfloat16":  # HDF5 has no such type: the bits are kept as integers.
        return rows.to(torch.bfloat16).view(torch.int16).numpy(), np.ones(len(rows))
    # In NumPy, since this runs beside the training: a second pool of torch's threads would fight it
    # for the cores.
    values = rows.numpy()
    largest = np.abs(values).max(axis=1, initial=0.0)
    scales = np.where(largest == 0, 1.0, largest).astype(np.float64)
    # A row that is not finite has no finite scale either, and comes back as it was: not finite.
    with np.errstate(invalid="ignore"):
        parts = values / scales.astype(values.dtype)[:, None]
        if storage == "float16":
            return parts.astype(np.float16), scales
        return np.nan_to_num(np.rint(parts * _INT8_LIMIT)).astype(np.int8), scales / _INT8_LIMIT


def decode(
    stored: np.ndarray, scales: Float[np.ndarray, " n"], storage: Storage
) -> Float[Tensor, "n k"]:
    """Return the rows that were encoded, in float32 or as they were computed."""
    rows = torch.from_numpy(stored)
    if storage == "as computed":
        return rows
    if storage == "bfloat16":
        return rows.view(torch.bfloat16).float()
    factors = torch.from_numpy(scales)[:, None]
    if bool((factors < _SMALLEST).any()):  # Products may have a place in float32, and scales none.
        return (rows * factors).float()
    return rows.float().mul_(factors.float())
