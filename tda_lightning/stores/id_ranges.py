"""Sample ids as half-open ranges: an id per sample would be long in a recipe."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor


def ranges_of(ids: Int[np.ndarray, " n"]) -> tuple[tuple[int, int], ...]:
    """Compress sorted, distinct ids into half-open ranges.

    >>> ranges_of(np.array([0, 1, 2, 7]))
    ((0, 3), (7, 8))
    """
    starts = np.flatnonzero(np.diff(ids, prepend=ids[:1] - 2) != 1)
    stops = np.append(starts[1:], len(ids))
    return tuple((int(ids[a]), int(ids[b - 1]) + 1) for a, b in zip(starts, stops, strict=True))


def merged(
    ranges: tuple[tuple[int, int], ...] | None, ids: Int[np.ndarray, " n"] | None
) -> tuple[tuple[int, int], ...] | None:
    """Return the ranges with more ids in them, or ``None`` if either are unknown.

    >>> merged(((0, 3), (7, 8)), np.array([2, 3, 9]))
    ((0, 4), (7, 8), (9, 10))
    """
    if ranges is None or ids is None:
        return None
    return ranges_of(np.union1d(ids_of(ranges).numpy(), ids))


def count_of(ranges: Iterable[tuple[int, int]]) -> int:
    """Return the number of ids in half-open ranges.

    >>> count_of([(0, 3), (7, 8)])
    4
    """
    return sum(b - a for a, b in ranges)


def ids_of(ranges: Iterable[tuple[int, int]]) -> Int[Tensor, " n"]:
    """Expand half-open ranges into ids.

    >>> ids_of([(0, 3), (7, 8)]).tolist()
    [0, 1, 2, 7]
    """
    parts = [torch.arange(a, b) for a, b in ranges]
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64)
