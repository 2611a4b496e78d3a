"""StepBuffer: steps waiting to be written, with their tensors in reused memory.

Fresh memory is expensive: the operating system provides and clears it page by page. A store that
held every step's own tensors until they are written would pay this cost in every step. Even small
tensors that stay, such as the ids of samples, would keep the large ones between them from being
returned: a training of 600 steps grew by 160 MB instead of 40.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from tda_lightning.stores.row_formats import Storage, storage_for
from tda_lightning.stores.step import OPTIONAL_FACTS, Step

_COLUMNS = ("sample_ids", "weights", *OPTIONAL_FACTS)


class StepBuffer:
    """Steps whose rows are stored contiguously in one tensor, and so are their other columns.

    Args:
        size: Capacity in bytes of rows.
        storage: Number format of the rows on disk. Rounding to bfloat16 while copying is faster
            than copying. The scales of other formats would take another pass.
    """

    def __init__(self, size: int, storage: Storage | None = None) -> None:
        self._size = size
        self._storage = storage
        self._rows: Tensor | None = None
        self._columns: dict[str, Tensor] = {}
        self._used = 0
        self.steps: list[Step] = []

    def has_room_for(self, step: Step) -> bool:
        """Return whether a step can be added; an empty buffer accepts a step of any size."""
        if not self.steps:
            return True
        first = self.steps[0]
        assert self._rows is not None
        dtype = self._dtype_of(step.sketch)
        is_compatible = dtype == self._rows.dtype and len(step.groups) == len(first.groups)
        return is_compatible and self._used + len(step.sketch) <= len(self._rows)

    def add(self, step: Step) -> None:
        """Add a step; its rows and the facts of its visits are copied."""
        if not self.steps:
            self._allocate(step.sketch)
        assert self._rows is not None
        place = slice(self._used, self._used + len(step.sketch))
        columns = {name: getattr(step, name) for name in _COLUMNS}
        facts = {
            name: self._column(name, values)[place].copy_(values)
            for name, values in columns.items()
            if values is not None
        }
        sketch = self._rows[place].copy_(step.sketch)
        self._used = place.stop
        self.steps.append(replace(step, sketch=sketch, **facts))

    def is_full(self) -> bool:
        """Return whether at least 90 % of the capacity is used."""
        return self._rows is not None and self._used >= 0.9 * len(self._rows)

    def clear(self) -> None:
        """Remove the steps and retain the memory."""
        self.steps = []
        self._used = 0

    def _column(self, name: str, values: Tensor) -> Tensor:
        """Return the memory of a column, as long as the rows."""
        assert self._rows is not None
        column = self._columns.get(name)
        if column is None or len(column) != len(self._rows) or column.dtype != values.dtype:
            column = self._columns[name] = torch.empty(len(self._rows), dtype=values.dtype)
        return column

    def _dtype_of(self, rows: Tensor) -> torch.dtype:
        is_rounded = storage_for(self._storage, rows.dtype) == "bfloat16"
        return torch.bfloat16 if is_rounded else rows.dtype

    def _allocate(self, rows: Tensor) -> None:
        n, k = rows.shape
        dtype = self._dtype_of(rows)
        count = max(n, self._size // (k * dtype.itemsize))
        fits = self._rows is not None and self._rows.shape == (count, k)
        if self._rows is None or not fits or self._rows.dtype != dtype:
            self._rows = torch.empty(count, k, dtype=dtype)
