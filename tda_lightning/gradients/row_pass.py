"""RowPass: the rows of one backward pass.

In coordinates that follow from the gradient of the batch, :class:`WaitingGradients` records them
late. A parameter's gradient of the whole batch is complete as soon as torch has accumulated it.
That is right after the last node that contributes to it. Until then, the gradients of the samples
wait.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from tda_lightning.gradients.capture.capture import Hold
from tda_lightning.gradients.capture.delivery import Receiver
from tda_lightning.gradients.capture.parameter_paths import ParameterGradient
from tda_lightning.gradients.losses import DeferredSummary
from tda_lightning.gradients.nodes.stacked import Slot
from tda_lightning.gradients.row_sum import HeldNodes, RepeatedGradients, RowSum, Values
from tda_lightning.gradients.sketching.block_maps import Place
from tda_lightning.gradients.sketching.sketcher import Sketcher
from tda_lightning.stores.step import Preconditioner


class RowPass:
    """Sums the rows of one backward pass of ``n`` samples.

    ``counts`` is as in :class:`RepeatedGradients`. Once the rows are finished, ``preconditioner``
    holds the coordinates that they have brought about.
    """

    def __init__(
        self,
        sketcher: Sketcher,
        places: Mapping[nn.Parameter, Place],
        n: int,
        counts: dict[nn.Parameter, int],
    ) -> None:
        self._sketcher, self._places, self._n, self._counts = sketcher, places, n, counts
        self._rows = RowSum(sketcher, n)
        self._held = HeldNodes(sketcher, self._rows, n)
        self._waiting: WaitingGradients | None = None
        self._repeated: RepeatedGradients | None = None
        self.preconditioner: Preconditioner | None = None

    def sum_blocks(self, sums: Float[Tensor, "blocks k1"] | None) -> None:
        """Add the sum of the rows of each block to ``sums``, as :class:`RowSum` does."""
        self._rows.sums = sums

    def receivers(
        self,
        lost: Collection[nn.Parameter],
        coordinates: Coordinates | None = None,
        is_accumulated_once: bool = True,
    ) -> tuple[Receiver, Hold]:
        """Return the functions to which a capture delivers parameters' gradients, and nodes.

        ``coordinates`` are those of the rows, if they follow from the batch's gradient;
        ``is_accumulated_once`` is as in :class:`WaitingGradients`.
        """
        receive = receiver(self._rows, self._sketcher, self._places, lost)
        if coordinates is None:
            self._repeated = RepeatedGradients(receive, self._counts)
            return self._repeated.receive, self._held.add
        waiting = self._waiting = WaitingGradients(
            coordinates, self._sketcher, self._places, receive, is_accumulated_once
        )
        record = self._held.record
        self._held = HeldNodes(
            self._sketcher,
            self._rows,
            self._n,
            lambda slot, values: waiting.hold(slot, values, record),
        )
        self._repeated = RepeatedGradients(waiting.receive, self._counts)
        return self._repeated.receive, self._held.add

    def rows(self) -> Float[Tensor, "n k"]:
        """Return the rows, with all gradients that still wait."""
        with torch.no_grad():
            self._record_all()
            return self._rows.rows()

    def take(self) -> Float[Tensor, "n k"]:
        """Return the rows, and begin with zeros again."""
        with torch.no_grad():
            self._record_all()
            return self._rows.take()

    def remove_hooks(self) -> None:
        """Remove all hooks of parameters."""
        if self._waiting is not None:
            self._waiting.remove_hooks()

    def _record_all(self) -> None:
        if self._repeated is not None:
            self._repeated.finish()
        if self._waiting is not None:
            waiting, self._waiting = self._waiting, None
            self.preconditioner = waiting.finish()
        self._held.finish()


@dataclass(frozen=True)
class BatchRows:
    """The recorded rows of a batch, with facts of its loss.

    Attributes:
        rows: Sketched contribution of each sample to the gradient of the loss, shape ``(n, k)``.
        loss: Summary of each sample's loss.
        curvature_rows: Rows for labels sampled from the model, if requested; none in a step that is
            not drawn. The expected sum of their outer products is the Gauss-Newton matrix of the
            loss.
    """

    rows: Float[Tensor, "n k"]
    loss: DeferredSummary
    curvature_rows: Float[Tensor, "m k"] | None


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

    Unless ``is_accumulated_once``, a parameter's gradient may not be complete when torch
    accumulates it first; then all gradients wait until the backward pass is over.
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


def receiver(
    rows: RowSum,
    sketcher: Sketcher,
    places: Mapping[nn.Parameter, Place],
    lost: Collection[nn.Parameter],
) -> Receiver:
    """Return a function that adds a parameter's gradients to rows, unless the parameter is lost."""

    def receive(gradient: ParameterGradient) -> None:
        if lost and gradient.parameter in lost:
            return
        place = places[gradient.parameter]
        contribution = gradient.in_rows_of(place.columns)
        start, size = gradient.start // place.columns, gradient.size // place.columns
        values = sketcher.project(place, contribution, start, size)
        rows.add((place.block,), values, gradient.dtype)

    return receive
