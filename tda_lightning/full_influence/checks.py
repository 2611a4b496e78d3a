"""Checks for NaN, infinity and negative eigenvalues, with error messages that name the source."""

from __future__ import annotations

import torch
from torch import Tensor

_INDEFINITE = (
    "Increase `damping` until it exceeds the magnitude of every negative eigenvalue, as the "
    "default does. Or use `curvature=GaussNewton()`, which has none."
)


def require_finite(numbers: Tensor, name: str, remedy: str) -> None:
    """Check that all numbers are finite; the message begins with their name, and ends in a remedy.

    >>> require_finite(torch.tensor([1.0, torch.nan]), "The mean", "Look at the samples.")
    Traceback (most recent call last):
        ...
    ValueError: The mean is not finite: 1 of 2 numbers are NaN or infinite. Look at the samples.
    """
    wrong = int((~torch.isfinite(numbers)).sum())
    if wrong:
        raise ValueError(
            f"{name} is not finite: {wrong:,} of {numbers.numel():,} numbers are NaN or infinite. "
            f"{remedy}"
        )


def require_definite(smallest: float, damping: float) -> None:
    """Check that damping outweighs the smallest eigenvalue of a curvature, or a bound above it."""
    if smallest + damping <= 0:
        raise ValueError(
            f"The curvature has an eigenvalue of {smallest:.3g} or less, and damping {damping:.3g} "
            f"does not compensate for it. {_INDEFINITE}"
        )
