"""Progress bars: shown on a terminal and in a notebook, not in a log file."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from typing import TypeVar

from tqdm import tqdm

Item = TypeVar("Item")


def progress_bar(
    items: Iterable[Item], name: str, unit: str, *, shown: bool, total: int | None = None
) -> Iterable[Item]:
    """Return an iterable over the items that shows a progress bar, if the user wants one.

    ``TQDM_DISABLE=1`` hides all bars.
    """
    is_shown = shown and is_watched()
    bar: Iterable[Item] = tqdm(
        items, total=total, desc=name, unit=unit, leave=False, disable=not is_shown
    )
    return bar


def is_watched() -> bool:
    """Return whether somebody sees a bar: standard error is a terminal, or a notebook's output."""
    if os.environ.get("TQDM_DISABLE", "0") not in ("", "0"):
        return False
    return sys.stderr.isatty() or "ipykernel" in sys.modules
