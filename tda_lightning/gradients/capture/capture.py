"""Capture: hook the nodes in which parameters meet data, and deliver each sample's gradients.

The graph of the loss is walked once, before its backward pass. When that pass reaches a meeting,
the node still holds its saved tensors, and is handed the gradient of its output: all that the
per-sample gradients of its parameters need. Nothing is attached to modules.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge
from torch.utils.hooks import RemovableHandle

from tda_lightning.gradients.capture.delivery import Delivery, NormsBehind, Receiver
from tda_lightning.gradients.capture.layout_memory import LayoutMemory
from tda_lightning.gradients.capture.pausing import PauseSwitch
from tda_lightning.gradients.capture.probe import backward_to_meetings
from tda_lightning.gradients.capture.tracer import joined_rows
from tda_lightning.gradients.capture.walk_plan import WalkPlans
from tda_lightning.gradients.graph.sample_layout import IrregularRows, KnownRows, SampleLayout
from tda_lightning.gradients.graph.walk import Edge, Meeting, Node, Walk
from tda_lightning.gradients.nodes.stacked import BlockOf, Slot, slot_of
from tda_lightning.stores.recipe import SampleAxis

# Called with a slot, and with the gradient of a node's output followed by what the node has saved.
Hold = Callable[[Slot, tuple[Tensor, ...]], None]
_Hook = Callable[[tuple[Tensor | None, ...]], None]


class SamplelessError(ValueError):
    """A loss whose graph has no rows of samples."""


class Capture:
    """Delivers per-sample gradients of parameters while a backward pass runs.

    Args:
        model: The model.
        recorded: The recorded parameters by their names.
        batch_dims: Axis of the samples in the layers whose names match a pattern, where it is not
            inferred rightly.
        block_of: Returns the number of the block that a parameter fills.
        followed: Names of parameters in front of batch norms whose running statistics follow them.
    """

    def __init__(
        self,
        model: nn.Module,
        recorded: Mapping[str, nn.Parameter],
        batch_dims: Mapping[str, SampleAxis],
        block_of: BlockOf,
        followed: Collection[str] = (),
    ) -> None:
        self.switch = PauseSwitch(model)
        self._model = model
        self._recorded: dict[Tensor, str] = {p: name for name, p in recorded.items()}
        declared: dict[Tensor, SampleAxis] = {
            parameter: axis
            for pattern, axis in batch_dims.items()
            for name, parameter in recorded.items()
            if fnmatchcase(name, pattern) or fnmatchcase(name.rpartition(".")[0], pattern)
        }
        self._layouts = LayoutMemory(self._recorded, declared)
        self._norms = NormsBehind(self._recorded, followed)
        self._plans = WalkPlans(
            self._layouts, lambda meeting: slot_of(meeting, block_of), self.switch.others_paused
        )
        self._walk: Walk | None = None
        self._delivery: Delivery | None = None
        self._visited: dict[Node, tuple[Edge, ...]] = {}
        self._receive: Receiver | None = None
        self._hold: Hold | None = None
        self._handles: list[RemovableHandle] = []
        self._clock: Callable[[], float] | None = None
        self.seconds = 0.0

    def take_time(self, clock: Callable[[], float] | None) -> None:
        """Reset ``seconds``, and add up the time of deliveries in it; ``None`` stops that."""
        self._clock, self.seconds = clock, 0.0

    def attach(self) -> None:
        """Find the model's other captures. Hooks are attached to a graph, before its backward."""
        self.switch.attach()

    def detach(self) -> None:
        """Remove every hook."""
        self.switch.detach()
        self.end_backward()

    @property
    def lost(self) -> Mapping[nn.Parameter, str]:
        """Why the rows of a parameter cannot be separated, by parameter."""
        return self._layouts.lost

    @property
    def normalized(self) -> set[str]:
        """Names of the parameters that the statistics of a batch follow."""
        return self._norms.names

    @property
    def with_samples(self) -> set[Node]:
        """The nodes of the last graph whose outputs depend on samples."""
        return set() if self._walk is None else self._walk.with_samples

    def joined_rows(self, n: int, known: KnownRows) -> int:
        """Return the rows per sample in the last graph, if nothing shows whose they are; else 0."""
        return 0 if self._layouts.declared else joined_rows(self.with_samples, n, known)

    @property
    def is_reentrant(self) -> bool:
        """Whether a part of the last graph is built and differentiated in the backward pass."""
        return self._walk is not None and self._walk.is_reentrant

    def rows_of(self, node: Node) -> SampleLayout | IrregularRows | None:
        """Return where the samples lie in a node of the last graph, if a parameter shows it."""
        meeting = None if self._walk is None else self._walk.meeting_of.get(node)
        if meeting is None:
            return None
        return self._layouts.rows_of(node, self._layouts.layout(node, *meeting.inputs[0]))

    @property
    def has_irregular_rows(self) -> bool:
        """Whether rows of the last graph are in no regular order."""
        return bool(self._layouts.irregular)

    def read_graph(self, loss: Tensor, n: int, known: KnownRows) -> None:
        """Find the meetings in the graph of the loss of ``n`` samples."""
        self._walk = self._plans.walk(loss, n, known)
        self._norms.start(self._walk)
        self._delivery = Delivery(self._recorded, self._layouts, self._norms, self._walk, n)
        if self._walk.is_sampleless:
            raise SamplelessError(
                f"In a batch of {n} samples, no operation has a row for each of the {n} samples; "
                "expected the samples along an axis of the tensors that parameters meet. If each "
                "item of the dataset is a batch, pass `sample_ids=` to identify the samples in it. "
                "If `collate_fn` drops samples, leave them out before training; if `training_step` "
                "does, drop their outputs after the forward pass instead. "
                "If the batch is a single sample, add the axis of samples: `x[None]`."
            )

    def start_backward(self, receive: Receiver, hold: Hold) -> None:
        """Deliver the gradients of the backward pass that begins now.

        ``receive`` is called with the gradients of a parameter, ``hold`` with the values of a node
        that can be recorded together with others.
        """
        assert self._walk is not None
        self._receive, self._hold = receive, hold
        self._hook(self._walk.single)
        self._handles += [
            node.register_prehook(self._holding_hook(node, slot)) for node, slot in self._walk.alike
        ]
        if self._walk.checkpoints:
            self._visited = {}
            self._watch_recomputation()

    def timed_backward(
        self, loss: Tensor, inputs: Sequence[Tensor], receive: Receiver, hold: Hold
    ) -> None:
        """Run the backward pass of a loss, deliver its rows, and retain the graph."""
        try:
            with self.switch.others_paused():
                self.start_backward(receive, hold)
                torch.autograd.grad(loss, inputs, retain_graph=True, allow_unused=True)
        finally:
            self._stop()

    def extra_backward(
        self, gradients: Sequence[tuple[GradientEdge, Tensor]], receive: Receiver, hold: Hold
    ) -> None:
        """Run a backward pass from edges with gradients, deliver its rows, and retain the graph."""
        assert self._walk is not None
        assert self._delivery is not None
        delivery, walk = self._delivery, self._walk
        edges, grads = [edge for edge, _ in gradients], [grad for _, grad in gradients]
        slots = dict(walk.alike)

        def deliver(node: Node, grads: tuple[Tensor | None, ...]) -> None:
            slot, grad = slots.get(node), grads[0]
            if slot is not None and grad is not None:
                values = slot.rule.saved(node)
                if values is not None:
                    hold(slot, (grad, *values))
                    return
            delivery.deliver(node, delivery.inputs(walk.meeting_of[node]), grads, receive)

        with self.switch.others_paused():
            backward_to_meetings(edges, grads, walk, walk.meetings, deliver)

    def end_backward(self) -> None:
        """Remove the hooks, and forget the graph."""
        self._walk = self._delivery = None
        self._norms.end()
        self._layouts.forget_graph()
        self._visited = {}
        self._stop()

    def _stop(self) -> None:
        self._receive = self._hold = None
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _hook(self, meetings: Sequence[Meeting]) -> None:
        for meeting in meetings:
            self._handles.append(meeting.node.register_prehook(self._prehook(meeting)))

    def _prehook(self, meeting: Meeting) -> _Hook:
        assert self._delivery is not None
        node, deliver = meeting.node, self._delivery.deliver
        inputs = self._delivery.inputs(meeting)

        def hook(grads: tuple[Tensor | None, ...]) -> None:
            if self._receive is not None and not self.switch.pauses:
                if self._clock is None:
                    deliver(node, inputs, grads, self._receive)
                    return
                with self.time_added():
                    deliver(node, inputs, grads, self._receive)

        return hook

    def _holding_hook(self, node: Node, slot: Slot) -> _Hook:
        saved, switch = slot.rule.saved, self.switch

        def hook(grads: tuple[Tensor | None, ...]) -> None:
            hold, grad = self._hold, grads[0]
            if hold is None or grad is None or switch.pauses:
                return
            values = saved(node)
            if values is None:  # This node differs from others of its kind.
                assert self._walk is not None
                self._prehook(self._walk.meeting_of[node])(grads)
            elif self._clock is None:
                hold(slot, (grad, *values))
            else:
                with self.time_added():
                    hold(slot, (grad, *values))

        return hook

    @contextmanager
    def time_added(self) -> Iterator[None]:
        """Add the time inside the context to ``seconds``, if time is measured."""
        clock = self._clock
        start = 0.0 if clock is None else clock()
        yield
        if clock is not None:
            self.seconds += clock() - start

    def _watch_recomputation(self) -> None:
        """Hook the graph that a reentrant checkpoint builds during the backward pass.

        The graph behind a module's output exists when the module returns.
        """

        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if self._receive is None or not torch.is_grad_enabled():
                return
            for tensor in torch.utils._pytree.tree_leaves(output):
                if isinstance(tensor, Tensor) and tensor.grad_fn is not None:
                    found = self._layouts.continue_walk(tensor.grad_fn, self._visited)
                    self._hook(found.meetings)

        self._handles += [module.register_forward_hook(hook) for module in self._model.modules()]
