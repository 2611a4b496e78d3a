"""RowSum: the rows of one backward pass, summed up from the gradients of its parameters.

:class:`HeldNodes` adds many small nodes together, once the pass has reached all of them.
:class:`RepeatedGradients` joins the gradients of a parameter that meets data in several nodes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tda_lightning.gradients.capture.delivery import Receiver
from tda_lightning.gradients.capture.parameter_paths import ParameterGradient
from tda_lightning.gradients.factors import Dense, GradientFactors
from tda_lightning.gradients.factors.gradient_factors import coarser
from tda_lightning.gradients.nodes.stacked import Slot, StackedFactors
from tda_lightning.gradients.sketching.block_maps import Shrunk
from tda_lightning.gradients.sketching.column_maps import Stack
from tda_lightning.gradients.sketching.sketcher import Sketcher

# Gradients wait to be treated together, up to this many numbers: more would hold too much memory.
_MAX_WAITING = 2**22


class RowSum:
    """Adds the shrunk gradients of one parameter after another to ``n`` rows.

    Where ``sums`` is set, the sum of the rows over all samples is added to it, block by block. Its
    last column receives a bound of the rounding error.
    """

    def __init__(self, sketcher: Sketcher, n: int) -> None:
        self._sketcher = sketcher
        self._n = n
        self._rows: Tensor | None = None
        self._stacks: list[Stack] = []
        self._waiting = 0
        self.sums: Float[Tensor, "blocks k1"] | None = None
        # The coarsest number format of the gradients.
        self._format = torch.float64

    def add(
        self, blocks: tuple[int, ...], values: Shrunk, stored: torch.dtype = torch.float64
    ) -> None:
        """Add the shrunk gradients of blocks; ``stored`` is the format they were computed from."""
        if values.numel() > _MAX_WAITING and len(blocks) > 1:
            for number, block in enumerate(blocks):
                self.add((block,), values[number : number + 1], stored)
            return
        self._format = coarser(stored, self._format)
        self._stacks.append((blocks, values))
        self._waiting += values.numel()
        if self._waiting > _MAX_WAITING:
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
        if self.sums is not None:
            self._add_to_sums(self.sums)
        if self._stacks or self._rows is None:
            rows = self._sketcher.hash_rows(self._stacks, self._n)
            self._rows = rows if self._rows is None else self._rows + rows
        self._stacks, self._waiting = [], 0

    def _add_to_sums(self, sums: Float[Tensor, "blocks k1"]) -> None:
        for blocks, stack in self._stacks:
            for number, block in enumerate(blocks):
                part = stack[number : number + 1]
                rows = self._sketcher.hash_rows([((block,), part)], self._n)
                sums[block, :-1] += rows.sum(dim=0)
                sums[block, -1] += rows.norm() * rounding_of(self._format, rows.dtype)


def rounding_of(stored: torch.dtype, summed: torch.dtype) -> float:
    """Return the rounding error of a sum of rows, relative to the root of their squares' sum.

    Torch may round the contributions of parts of a batch before it adds them up. Each then has an
    error of half the precision in which it is ``stored``. These errors are independent. The sums
    add up the rounding errors of many terms.
    """
    return torch.finfo(stored).eps / 2 + 64 * torch.finfo(summed).eps


# Numbers in the outputs and inputs of a node that waits: for larger ones, arithmetic takes longer
# than calling it.
_MAX_NUMBERS = 2**17

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
            self._rows.add(blocks, self._sketcher.project_stack(blocks, gradient, n), stored)


def _stack(tensors: tuple[Tensor, ...]) -> Tensor:
    return torch.stack(tensors) if len(tensors) > 1 else tensors[0][None]


class RepeatedGradients:
    """Joins the gradients of parameters that occurred several times in the last backward pass.

    A recurrent cell uses its weights in every time step. Its gradient is one sum over all of them,
    and the product of joined factors computes that sum at once. Shrinking and hashing the gradient
    of each time step took six times a plain step, for a GRU and 50 steps.

    ``counts`` is how often each parameter occurred in the last pass; it is changed in place.
    """

    def __init__(self, receive: Receiver, counts: dict[nn.Parameter, int]) -> None:
        self._receive = receive
        self._last = counts
        self._counts: dict[nn.Parameter, int] = {}
        self._groups: dict[Any, list[ParameterGradient]] = {}
        self._room = _MAX_WAITING

    def receive(self, gradient: ParameterGradient) -> None:
        """Record the gradients of a parameter: later, if it is likely to occur again."""
        parameter, counts = gradient.parameter, self._counts
        counts[parameter] = counts.get(parameter, 0) + 1
        kind = _kind(gradient) if self._last.get(parameter, 0) > 1 else None
        if kind is None:
            self._receive(gradient)
            return
        self._groups.setdefault(kind, []).append(gradient)
        self._room -= _size(gradient)
        if self._room < 0:
            self._record_all()

    def finish(self) -> None:
        """Record the gradients that wait; another pass may follow."""
        self._record_all()
        if self._counts:
            self._last.clear()
            self._last.update(self._counts)
            self._counts.clear()

    def _record_all(self) -> None:
        groups, self._groups, self._room = self._groups, {}, _MAX_WAITING
        for gradients in groups.values():
            self._receive(_joined(gradients))


def _kind(gradient: ParameterGradient) -> Any:
    """Return what gradients that can be joined have in common, ``None`` if they cannot."""
    values = gradient.contribution
    place = (gradient.parameter, gradient.start, gradient.shape)
    if isinstance(values, Tensor):
        return (*place, values.shape, values.dtype)
    inputs, grads = values.inputs, values.grad_outputs
    if values.correction is not None or not isinstance(inputs, Dense):
        return None
    return (*place, inputs.dtype, grads.dtype) if isinstance(grads, Dense) else None


def _size(gradient: ParameterGradient) -> int:
    values = gradient.contribution
    if isinstance(values, Tensor):
        return values.numel()
    return sum(each.rows.numel() for each in _operands(values))


def _operands(factors: GradientFactors) -> tuple[Dense, Dense]:
    assert isinstance(factors.inputs, Dense)
    assert isinstance(factors.grad_outputs, Dense)
    return factors.inputs, factors.grad_outputs


def _joined(gradients: Sequence[ParameterGradient]) -> ParameterGradient:
    """Return the sum of some gradients: as a sum, or as factors with the rows of all of them."""
    first = gradients[0]
    if len(gradients) == 1:
        return first
    tensors, operands = [], []
    for gradient in gradients:
        values = gradient.contribution
        if isinstance(values, Tensor):
            tensors.append(values)
        else:
            operands.append(_operands(values))
    if tensors:
        total = torch.stack(tensors).sum(dim=0)
        return ParameterGradient(first.parameter, total, first.shape, first.start)
    inputs, grads = (_rows_of_all(sides) for sides in zip(*operands, strict=True))
    factors = GradientFactors(inputs=inputs, grad_outputs=grads)
    return ParameterGradient(first.parameter, factors, first.shape, first.start)


def _rows_of_all(sides: Sequence[Dense]) -> Dense:
    n, width = sides[0].n, sides[0].rows.shape[1]
    parts: list[Float[Tensor, "n s d"]] = [side.rows.reshape(n, -1, width) for side in sides]
    return Dense(torch.cat(parts, dim=1).flatten(0, 1), n)
