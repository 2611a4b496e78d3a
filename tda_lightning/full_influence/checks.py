"""Checks: what numbers have to be for scores to mean something, said where they come in."""

from __future__ import annotations

import torch
from torch import Tensor

_INDEFINITE = (
    "Give more damping: it must make up for all negative eigenvalues, as the default does. Or take "
    "`curvature=GaussNewton()`, which has none."
)


def require_finite(numbers: Tensor, whose: str, remedy: str) -> None:
    """Raise if some numbers are NaN or infinite.

    Args:
        numbers: Any.
        whose: What they belong to, to begin a sentence with.
        remedy: Where to look for the reason.

    Raises:
        ValueError: Saying so.

    >>> require_finite(torch.tensor([1.0, torch.nan]), "The mean", "Look at the samples.")
    Traceback (most recent call last):
        ...
    ValueError: The mean is not finite: 1 of 2 numbers are NaN or infinite. Look at the samples.
    """
    wrong = int((~torch.isfinite(numbers)).sum())
    if wrong:
        raise ValueError(
            f"{whose} is not finite: {wrong:,} of {numbers.numel():,} numbers are NaN or infinite. "
            f"{remedy}"
        )


def require_definite(smallest: float, damping: float) -> None:
    """Raise unless damping makes up for a curvature's smallest eigenvalue.

    Args:
        smallest: The smallest eigenvalue, or what it is at most.
        damping: Added to all of them.

    Raises:
        ValueError: Saying what to do.
    """
    if smallest + damping <= 0:
        raise ValueError(
            f"The curvature has an eigenvalue of {smallest:.3g} or less, and damping {damping:.3g} "
            f"does not make up for it. {_INDEFINITE}"
        )
