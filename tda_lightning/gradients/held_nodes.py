"""HeldNodes: record many small nodes together, once the backward pass has reached all of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from tda_lightning.gradients.capture.slots import Slot
from tda_lightning.gradients.nodes.stacked import StackedFactors
from tda_lightning.gradients.row_sum import RowSum
from tda_lightning.gradients.sketching.sketcher import Sketcher

# Nodes that wait, by the numbers in their outputs and inputs, and all of them together: for larger
# ones arithmetic takes longer than calling it, and waiting holds memory.
_MAX_NUMBERS = 2**17
_MAX_WAITING = 2**22

# The gradient of a node's output, and the tensors that it saved.
Values = tuple[Tensor, ...]


class HeldNodes:
    """Records nodes of one kind and shape together.

    Args:
        sketcher: Shrinks the gradients.
        rows: Rows to add them to.
        n: Number of samples.
        record_large: Called with a large node; by default it is recorded at once.
    """

    def __init__(
        self,
        sketcher: Sketcher,
        rows: RowSum,
        n: int,
        record_large: Callable[[Slot, Values], None] | None = None,
    ) -> None:
        self._sketcher, self._rows, self._n = sketcher, rows, n
        # No bound method of this object: a cycle would hold the rows until it is collected.
        self._record_large = record_large
        self._groups: dict[Any, tuple[list[Slot], list[Values]]] = {}
        self._room = _MAX_WAITING

    def add(self, slot: Slot, values: Values) -> None:
        """Record a node later, if it is small.

        Args:
            slot: Its slot.
            values: The gradient of its output, and the tensors that it saved.
        """
        grad = values[0]
        size = grad.numel() + values[1].numel()
        if size > _MAX_NUMBERS or size > self._room:
            (self._record_large or self.record)(slot, values)
            return
        slots, waiting = self._groups.setdefault((slot.kind, grad.shape, grad.dtype), ([], []))
        slots.append(slot)
        waiting.append(values)
        self._room -= size

    def finish(self) -> None:
        """Record the nodes that wait."""
        groups, self._groups, self._room = self._groups, {}, _MAX_WAITING
        with torch.no_grad():
            for slots, values in groups.values():
                self._record(slots, values)

    def record(self, slot: Slot, values: Values) -> None:
        """Record a node at once."""
        with torch.no_grad():
            self._record([slot], [values])

    def _record(self, slots: Sequence[Slot], values: Sequence[Values]) -> None:
        rule, n = slots[0].rule, self._n
        stacked = [_stack(tensors) for tensors in zip(*values, strict=True)]
        numbers = zip(*[slot.blocks for slot in slots], strict=True)
        for (position, _, is_transposed), blocks in zip(slots[0].inputs, numbers, strict=True):
            gradient = rule.gradient(position, stacked, n)
            stored = gradient.dtype
            if is_transposed and isinstance(gradient, StackedFactors):
                gradient = gradient.transposed()
            self._rows.add_stack(blocks, self._sketcher.project_stack(blocks, gradient, n), stored)


def _stack(tensors: tuple[Tensor, ...]) -> Tensor:
    return torch.stack(tensors) if len(tensors) > 1 else tensors[0][None]
