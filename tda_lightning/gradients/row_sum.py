"""RowSum: the rows of one backward pass, summed up from the gradients of its parameters.

:class:`HeldNodes` adds many small nodes together, once the pass has reached all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tda_lightning.gradients.factors.gradient_factors import coarser
from tda_lightning.gradients.nodes.stacked import Slot, StackedFactors
from tda_lightning.gradients.sketching.block_maps import Factored, Shrunk, multiply
from tda_lightning.gradients.sketching.column_maps import Stack
from tda_lightning.gradients.sketching.sketcher import Sketcher

# Shrunk gradients wait up to this many numbers: hashing them together is faster.
_MAX_WAITING_NUMBERS = 2**22


class RowSum:
    """Adds the shrunk gradients of one parameter after another to ``n`` rows.

    Where ``sums`` is set, the sum of the rows over all samples is added to it, block by block, and
    in a last column a bound of its rounding error.
    """

    def __init__(self, sketcher: Sketcher, n: int) -> None:
        self._sketcher = sketcher
        self._n = n
        self._rows: Tensor | None = None
        self._stacks: list[Stack] = []
        self._factored: dict[tuple[int, ...], list[tuple[int, Factored]]] = {}
        self._waiting = 0
        self.sums: Float[Tensor, "blocks k1"] | None = None
        # The coarsest number format of the gradients.
        self._format = torch.float64

    def add(self, block: int, values: Shrunk, stored: torch.dtype = torch.float64) -> None:
        """Add the shrunk gradients of a block; ``stored`` is the format they were computed from."""
        if isinstance(values, Factored):
            self._format = coarser(stored, self._format)
            self._factored.setdefault(values.shapes, []).append((block, values))
            self._waiting += values.left.numel() + values.right.numel()
            self._hash_if_many()
        else:
            self.add_stack((block,), values[None], stored)

    def add_stack(
        self, blocks: tuple[int, ...], values: Float[Tensor, "blocks n m"], stored: torch.dtype
    ) -> None:
        """Add the shrunk gradients of several blocks of the same shape."""
        self._format = coarser(stored, self._format)
        self._stacks.append((blocks, values))
        self._waiting += values.numel()
        self._hash_if_many()

    def _hash_if_many(self) -> None:
        if self._waiting > _MAX_WAITING_NUMBERS:
            self._hash()

    def rows(self) -> Float[Tensor, "n k"]:
        """Return the rows."""
        self._hash()
        assert self._rows is not None
        return self._rows

    def take(self) -> Float[Tensor, "n k"]:
        """Return the rows, and begin with zeros again."""
        rows = self.rows()
        self._rows = None
        return rows

    def _hash(self) -> None:
        for pairs in self._factored.values():
            blocks = tuple(block for block, _ in pairs)
            values = multiply([values for _, values in pairs], self._sketcher.dtype)
            self._stacks.append((blocks, values))
        if self.sums is not None:
            self._add_to_sums(self.sums)
        if self._stacks or self._rows is None:
            rows = self._sketcher.hash_rows(self._stacks, self._n)
            self._rows = rows if self._rows is None else self._rows + rows
        self._stacks, self._factored, self._waiting = [], {}, 0

    def _add_to_sums(self, sums: Float[Tensor, "blocks k1"]) -> None:
        for blocks, stack in self._stacks:
            for number, block in enumerate(blocks):
                part = ((block,), stack[number : number + 1])
                rows = self._sketcher.hash_rows([part], self._n)
                sums[block, :-1] += rows.sum(dim=0)
                sums[block, -1] += rows.norm() * rounding_of(self._format, rows.dtype)


def rounding_of(stored: torch.dtype, summed: torch.dtype) -> float:
    """Return the rounding error of a sum of rows, relative to the root of their squares' sum.

    Torch may round the contributions of parts of a batch before it adds them up, each with an error
    of half the precision in which they are ``stored``. These errors are independent. The sums add
    up the rounding errors of many terms.
    """
    return torch.finfo(stored).eps / 2 + 64 * torch.finfo(summed).eps


# Nodes that wait, by the numbers in their outputs and inputs, and all of them together: for larger
# ones arithmetic takes longer than calling it, and waiting holds memory.
_MAX_NUMBERS = 2**17
_MAX_WAITING = 2**22

# The gradient of a node's output, and the tensors that it saved.
Values = tuple[Tensor, ...]


class HeldNodes:
    """Records nodes of one kind and shape together.

    ``record_large`` is called with a large node; by default it is recorded at once.
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
        """Record a node later, if it is small."""
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
