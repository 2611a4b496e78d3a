"""Check that the parts of a segment fit together, before any step is read from it."""

from __future__ import annotations

from collections.abc import Sequence, Sized
from itertools import pairwise


def require_rising(indices: Sequence[int]) -> None:
    """Check that steps come in order.

    >>> require_rising([4, 2])
    Traceback (most recent call last):
        ...
    ValueError: Step 2 comes after step 4; expected rising indices from 0.
    """
    if indices and indices[0] < 0:
        raise ValueError(f"The first step is {indices[0]}; expected rising indices from 0.")
    for before, after in pairwise(indices):
        if after <= before:
            raise ValueError(
                f"Step {after} comes after step {before}; expected rising indices from 0."
            )


def require_offsets(offset: Sequence[int], n_steps: int, n_rows: int) -> None:
    """Check that offsets divide rows among steps.

    >>> require_offsets([0, 5, 3], 2, 3)
    Traceback (most recent call last):
        ...
    ValueError: The offsets of 2 steps in 3 rows do not rise from 0 to 3.
    """
    is_rising = all(before <= after for before, after in pairwise(offset))
    if len(offset) != n_steps + 1 or offset[0] != 0 or offset[-1] != n_rows or not is_rising:
        raise ValueError(
            f"The offsets of {n_steps} steps in {n_rows} rows do not rise from 0 to {n_rows}."
        )


def require_lengths(expected: int, **columns: Sized) -> None:
    """Check that every column has the expected number of entries.

    >>> require_lengths(3, weight=[1.0, 2.0])
    Traceback (most recent call last):
        ...
    ValueError: `weight` has 2 entries; expected 3.
    """
    for name, column in columns.items():
        if len(column) != expected:
            raise ValueError(f"`{name}` has {len(column)} entries; expected {expected}.")
