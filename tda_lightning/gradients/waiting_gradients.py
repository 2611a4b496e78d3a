"""WaitingGradients: record gradients in coordinates that follow from the gradient of the batch.

A parameter's gradient of the whole batch is complete as soon as torch has accumulated it. That is
right after the last node that contributes to it. Until then, the gradients of the samples wait.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from tda_lightning.gradients.capture.delivery import Receiver
from tda_lightning.gradients.capture.parameter_paths import ParameterGradient
from tda_lightning.gradients.capture.slots import Slot
from tda_lightning.gradients.held_nodes import Values
from tda_lightning.gradients.selection import Place
from tda_lightning.gradients.sketching.sketcher import Sketcher
from tda_lightning.stores.step import Preconditioner


class Coordinates(ABC):
    """Coordinates that follow from the accumulated gradients."""

    @abstractmethod
    def of(self, parameter: nn.Parameter) -> tuple[Tensor, Tensor]:
        """Return the factors of a block's rows and columns, from its parameter's gradient."""

    @abstractmethod
    def complete(self) -> Preconditioner:
        """Return the coordinates of all blocks."""


@dataclass
class _Entry:
    parameters: set[nn.Parameter]
    work: Callable[[], None]


class WaitingGradients:
    """Holds per-sample gradients of one backward pass until their coordinates are known.

    Args:
        coordinates: The coordinates.
        sketcher: Shrinks gradients, and is given the coordinates.
        places: Where each parameter lies.
        receive: Records the gradients of a parameter.
        is_accumulated_once: Whether each parameter's gradient is complete when torch accumulates
            it first; if not, all wait until the backward pass is over.
    """

    def __init__(
        self,
        coordinates: Coordinates,
        sketcher: Sketcher,
        places: Mapping[nn.Parameter, Place],
        receive: Receiver,
        is_accumulated_once: bool,
    ) -> None:
        self._coordinates, self._sketcher, self._places = coordinates, sketcher, places
        self._receive, self._is_accumulated_once = receive, is_accumulated_once
        self._entries: dict[nn.Parameter, list[_Entry]] = {}
        self._handles: list[RemovableHandle] = []

    def receive(self, gradient: ParameterGradient) -> None:
        """Record the gradients of a parameter later."""
        self._wait([gradient.parameter], lambda: self._receive(gradient))

    def hold(self, slot: Slot, values: Values, record: Callable[[Slot, Values], None]) -> None:
        """Record a node later."""
        parameters = [parameter for _, parameter, _ in slot.inputs]
        self._wait(parameters, lambda: record(slot, values))

    def finish(self) -> Preconditioner:
        """Record the gradients that still wait, and return the coordinates of all blocks."""
        self.remove_hooks()
        with torch.no_grad():
            preconditioner = self._coordinates.complete()
            self._sketcher.precondition(preconditioner)
            for parameter in list(self._entries):
                self._work_off(parameter)
        return preconditioner

    def remove_hooks(self) -> None:
        """Remove the hooks of all parameters."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _wait(self, parameters: Sequence[nn.Parameter], work: Callable[[], None]) -> None:
        entry = _Entry(set(parameters), work)
        for parameter in entry.parameters:
            if parameter not in self._entries and self._is_accumulated_once:
                handle = parameter.register_post_accumulate_grad_hook(  # type: ignore[no-untyped-call]
                    self._accumulated
                )
                self._handles.append(handle)
            self._entries.setdefault(parameter, []).append(entry)

    def _accumulated(self, parameter: Tensor) -> None:
        assert isinstance(parameter, nn.Parameter)
        if parameter in self._entries:
            with torch.no_grad():
                block = self._places[parameter].block
                self._sketcher.precondition_block(block, *self._coordinates.of(parameter))
                self._work_off(parameter)

    def _work_off(self, parameter: nn.Parameter) -> None:
        for entry in self._entries.pop(parameter):
            entry.parameters.discard(parameter)
            if not entry.parameters:
                entry.work()
