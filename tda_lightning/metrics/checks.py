"""Checks of what metrics are given: a mask of numbers would count samples as others."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def require_numbers(name: str, value: Any, axes: int, example: str) -> None:
    """Raise unless an argument is a tensor of floating-point numbers.

    Args:
        name: Of the argument.
        value: What came.
        axes: How many it has to have.
        example: Where one comes from.

    Raises:
        ValueError: Saying so.
    """
    if not isinstance(value, Tensor) or not value.is_floating_point() or value.ndim != axes:
        raise ValueError(
            f"`{name}` is {said(value)}; expected floating-point numbers in a tensor of {axes} "
            f"ax{'i' if axes == 1 else 'e'}s, such as `{example}`."
        )


def require_mask(name: str, value: Any, shape: tuple[int, ...]) -> None:
    """Raise unless an argument is a tensor of booleans, of the shape that others have.

    Args:
        name: Of the argument.
        value: What came.
        shape: What is expected.

    Raises:
        ValueError: Saying so.
    """
    if not isinstance(value, Tensor) or value.dtype != torch.bool or tuple(value.shape) != shape:
        raise ValueError(
            f"`{name}` is {said(value)}; expected a tensor of booleans of shape {shape}, one per "
            "training sample. Make one of ids with `torch.isin(train_ids, ids)`."
        )


def said(value: Any) -> str:
    """Say in a few words what an argument is."""
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)} ({value.dtype})"
    return f"a {type(value).__name__}"
