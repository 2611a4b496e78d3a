"""Double precision, which not every device has."""

from __future__ import annotations

import torch
from torch import Tensor

# Apple's GPUs have neither double precision nor most of linear algebra.
DEVICES_WITHOUT_DOUBLE = {"mps"}


def widest_format(device: torch.device) -> torch.dtype:
    """Return the most precise format of real numbers on a device.

    >>> widest_format(torch.device("mps"))
    torch.float32
    """
    return torch.float32 if device.type in DEVICES_WITHOUT_DOUBLE else torch.float64


def with_double_precision(device: torch.device) -> torch.device:
    """Return a device, or the CPU if it has no double precision."""
    return torch.device("cpu") if device.type in DEVICES_WITHOUT_DOUBLE else device


def in_double_precision(tensor: Tensor) -> Tensor:
    """Return a tensor in double precision, on its device if that has it, otherwise on the CPU."""
    return tensor.to(with_double_precision(tensor.device), torch.float64)
