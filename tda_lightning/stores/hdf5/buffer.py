"""StepBuffer: steps that wait to be written, with their rows in memory that is used again.

Fresh memory is expensive: the operating system hands it out page by page, and clears each page. A
store that kept every step's own tensors until they are written would pay for that in every step.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from tda_lightning.stores.step import Step


class StepBuffer:
    """Steps whose rows lie one after the other in one piece of memory.

    Args:
        size: Bytes of rows to make room for.
        dtype: Number format to keep rows in, if another than they come in.
    """

    def __init__(self, size: int, dtype: torch.dtype | None = None) -> None:
        self._size = size
        self._dtype = dtype
        self._rows: Tensor | None = None
        self._used = 0
        self.steps: list[Step] = []

    def has_room_for(self, step: Step) -> bool:
        """Say whether a step can be added; an empty buffer takes any, however large."""
        if not self.steps:
            return True
        first = self.steps[0]
        assert self._rows is not None
        dtype = self._dtype or step.sketch.dtype
        is_alike = dtype == self._rows.dtype and len(step.groups) == len(first.groups)
        return is_alike and self._used + len(step.sketch) <= len(self._rows)

    def add(self, step: Step) -> None:
        """Add a step; its rows are copied."""
        n = len(step.sketch)
        if not self.steps:
            self._make_room(step.sketch)
        assert self._rows is not None
        kept = self._rows[self._used : self._used + n]
        kept.copy_(step.sketch)
        self._used += n
        self.steps.append(replace(step, sketch=kept))

    def is_full(self) -> bool:
        """Say whether all room is used, to within a tenth."""
        return self._rows is not None and self._used >= 0.9 * len(self._rows)

    def clear(self) -> None:
        """Forget the steps, and keep the memory."""
        self.steps = []
        self._used = 0

    def _make_room(self, rows: Tensor) -> None:
        n, k = rows.shape
        dtype = self._dtype or rows.dtype
        count = max(n, self._size // (k * dtype.itemsize))
        fits = self._rows is not None and self._rows.shape == (count, k)
        if self._rows is None or not fits or self._rows.dtype != dtype:
            self._rows = torch.empty(count, k, dtype=dtype)
