"""HeldNodes: record many small nodes together, once the pass back has reached all of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tda_lightning.gradients.capture.slots import Slot
from tda_lightning.gradients.nodes.stacked import StackedFactors
from tda_lightning.gradients.row_sum import RowSum
from tda_lightning.gradients.selection import Place
from tda_lightning.gradients.sketching.sketcher import Sketcher

# Outputs of nodes that wait, in numbers: the arithmetic of larger ones takes longer than calling
# it, and waiting holds memory.
_MAX_OUTPUT = 2**16
_MAX_WAITING = 2**21

# The gradient of a node's output, and the tensors that it saved.
_Values = tuple[Tensor, ...]


class HeldNodes:
    """Records nodes of one kind and shape together.

    Args:
        sketcher: Shrinks the gradients.
        places: Where each parameter lies.
    """

    def __init__(self, sketcher: Sketcher, places: Mapping[nn.Parameter, Place]) -> None:
        self._sketcher, self._places = sketcher, places
        self._groups: dict[Any, tuple[list[Slot], list[_Values]]] = {}
        self._waiting = 0
        # The numbers of the blocks of slots that were recorded together, for each input.
        self._blocks: dict[tuple[Slot, ...], list[tuple[int, ...]]] = {}
        self._rows: RowSum | None = None

    def start(self, rows: RowSum) -> None:
        """Add to some rows from now on."""
        self._groups, self._waiting, self._rows = {}, 0, rows

    def add(self, slot: Slot, values: _Values) -> None:
        """Record a node, at once or later.

        Args:
            slot: Its slot.
            values: The gradient of its output, and the tensors that it saved.
        """
        grad = values[0]
        size = grad.numel()
        if size > _MAX_OUTPUT:
            self._record([slot], [values])
            return
        slots, waiting = self._groups.setdefault((slot.kind, grad.shape, grad.dtype), ([], []))
        slots.append(slot)
        waiting.append(values)
        self._waiting += size
        if self._waiting > _MAX_WAITING:
            self.finish()

    def finish(self) -> None:
        """Record the nodes that wait."""
        groups, self._groups, self._waiting = self._groups, {}, 0
        for slots, values in groups.values():
            self._record(slots, values)

    def _record(self, slots: Sequence[Slot], values: Sequence[_Values]) -> None:
        assert self._rows is not None
        slot = slots[0]
        with torch.no_grad():
            stacked = [_stack(tensors) for tensors in zip(*values, strict=True)]
            for (position, _, is_transposed), blocks in zip(
                slot.inputs, self._blocks_of(tuple(slots)), strict=True
            ):
                gradient = slot.rule.gradient(position, stacked, slot.n)
                stored = gradient.dtype
                if is_transposed and isinstance(gradient, StackedFactors):
                    gradient = gradient.transposed()
                shrunk = self._sketcher.project_stack(blocks, gradient, slot.n)
                self._rows.add_stack(blocks, shrunk, stored)

    def _blocks_of(self, slots: tuple[Slot, ...]) -> list[tuple[int, ...]]:
        if slots not in self._blocks:
            parameters = [[parameter for _, parameter, _ in slot.inputs] for slot in slots]
            numbers = [[self._places[p].block for p in of_slot] for of_slot in parameters]
            self._blocks[slots] = list(zip(*numbers, strict=True))
        return self._blocks[slots]


def _stack(tensors: Sequence[Tensor]) -> Tensor:
    return torch.stack(tensors) if len(tensors) > 1 else tensors[0][None]
