"""Asides: what one listener does to a model for its own purposes, the others are not to hear."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

# Not local to a thread: on a GPU, backward passes run in threads of their own.
_asides: list[object] = []


@contextmanager
def capture_paused(listener: object = None) -> Iterator[None]:
    """Let nobody hear what happens inside, or one listener only."""
    _asides.append(listener)
    try:
        yield
    finally:
        _asides.pop()


def is_capturing(listener: object) -> bool:
    """Say whether what happens now is for this listener."""
    return not _asides or _asides[-1] is listener
