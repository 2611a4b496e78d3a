"""Checks of metric arguments.

Without them, numbers in place of a boolean mask would select the wrong samples.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def require_numbers(name: str, value: Any, axes: int, example: str) -> None:
    """Check that an argument is a tensor of floating-point numbers, with this number of axes."""
    if not isinstance(value, Tensor) or not value.is_floating_point() or value.ndim != axes:
        raise ValueError(
            f"`{name}` is {describe(value)}; expected floating-point numbers in a tensor of {axes} "
            f"ax{'i' if axes == 1 else 'e'}s, such as `{example}`."
        )


def require_rankable(name: str, value: Any, axes: int, example: str) -> None:
    """Check an argument as :func:`require_numbers` does, and that none of its numbers is NaN."""
    require_numbers(name, value, axes, example)
    n_nan = int(value.isnan().sum())
    if n_nan:
        raise ValueError(
            f"`{name}` has {n_nan} NaN among {value.numel()} numbers; expected none, since NaN has "
            "no rank. Leave these queries or samples out, or find out why they are NaN."
        )


def require_mask(name: str, value: Any, shape: tuple[int, ...]) -> None:
    """Check that an argument is a tensor of booleans of this shape."""
    if not isinstance(value, Tensor) or value.dtype != torch.bool or tuple(value.shape) != shape:
        raise ValueError(
            f"`{name}` is {describe(value)}; expected a tensor of booleans of shape {shape}, one "
            "per training sample. Convert ids to a mask with `torch.isin(train_ids, ids)`."
        )


def describe(value: Any) -> str:
    """Describe an argument by its type, for a message; a tensor by its shape and dtype."""
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)} ({value.dtype})"
    return f"a {type(value).__name__}"
