"""Durable files: whole or not there, whatever happens while they are written."""

from __future__ import annotations

import os
from pathlib import Path


def partial_name(path: Path) -> Path:
    """Return the name of a file that is being written: with it, it can be ignored."""
    return path.with_name(f".{path.name}.partial")


def make_durable(path: Path) -> None:
    """Wait until a file's or folder's content has reached the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
