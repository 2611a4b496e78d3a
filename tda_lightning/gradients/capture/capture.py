"""Capture: hook the nodes in which parameters meet data, and deliver each sample's gradients.

The graph of the loss is walked once, before its backward pass. When that pass reaches a meeting,
the node still holds what it saved, and is handed the gradient of its output: all that the
per-sample gradients of its parameters need. Nothing is attached to modules or held by the capture.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge
from torch.utils.hooks import RemovableHandle

from tda_lightning.gradients.capture.layouts import UNKNOWN, Layout, LayoutMemory
from tda_lightning.gradients.capture.norms import NormsBehind
from tda_lightning.gradients.capture.parameter_paths import ParameterGradient, to_parameters
from tda_lightning.gradients.capture.pausing import PauseSwitch
from tda_lightning.gradients.capture.probe import backward_to_meetings
from tda_lightning.gradients.graph.routing import RoutedRows
from tda_lightning.gradients.graph.sample_layout import SINGLE_ROWS
from tda_lightning.gradients.graph.walk import Edge, Meeting, Node, Walk, output_shape
from tda_lightning.gradients.nodes import NodeCall, NodeRule, rule_for
from tda_lightning.stores.recipe import SampleAxis

Receiver = Callable[[ParameterGradient], None]
# Positions of inputs that operations add to the others.
_ADDENDS = {"ConvolutionBackward0": (2,), "AddmmBackward0": (0,), "AddBackward0": (0, 1)}
NO_EFFECT = "it acts through a batch norm, which subtracts it again, and has no effect"


def _no_owner(meeting: Meeting) -> str:
    kind = type(meeting.node).__name__.removesuffix("Backward0")
    return (
        f"it meets the samples in an operation `{kind}` of shape {meeting.shape}, whose rows "
        "belong to no single sample"
    )


class Capture:
    """Delivers per-sample gradients of parameters while a backward pass runs.

    Args:
        model: The model.
        recorded: The recorded parameters by their names.
        batch_dims: Axis of the samples in the layers whose names match a pattern, where it is not
            inferred rightly.
        followed: Names of parameters in front of batch norms whose running statistics follow them.

    Attributes:
        switch: Pauses this capture and the model's others during extra passes through the model.
    """

    def __init__(
        self,
        model: nn.Module,
        recorded: Mapping[str, nn.Parameter],
        batch_dims: Mapping[str, SampleAxis],
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
        self._n: int | None = None
        self._walk: Walk | None = None
        self._visited: dict[Node, tuple[Edge, ...]] = {}
        self._receive: Receiver | None = None
        self._handles: list[RemovableHandle] = []
        self._clock: Callable[[], float] | None = None
        self.seconds = 0.0

    def take_time(self, clock: Callable[[], float] | None) -> None:
        """Reset ``seconds``, and add up the time of deliveries in it; ``None`` stops that."""
        self._clock, self.seconds = clock, 0.0

    def __enter__(self) -> Capture:
        """Find the model's other captures. Hooks are attached to a graph, before its backward."""
        self.switch.attach()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None = None,
        error: BaseException | None = None,
        trace: TracebackType | None = None,
    ) -> None:
        """Remove every hook."""
        self.switch.detach()
        self.end_backward()

    @property
    def lost(self) -> Mapping[nn.Parameter, str]:
        """Why the rows of a parameter cannot be told apart, by parameter."""
        return self._layouts.lost

    @property
    def normalized(self) -> set[str]:
        """Names of the parameters that the statistics of a batch follow."""
        return self._norms.names

    @property
    def with_samples(self) -> set[Node]:
        """The nodes of the last graph whose outputs depend on samples."""
        return set() if self._walk is None else self._walk.with_samples

    def read_graph(self, loss: Tensor, n: int) -> None:
        """Find the meetings in the graph of the loss of ``n`` samples."""
        self._n = n
        with self.switch.others_paused():
            self._walk = self._layouts.walk(loss, n)
        self._norms.start(self._walk)
        if self._walk.is_sampleless:
            raise ValueError(
                f"In a batch of {n} samples, no operation has a row for each of the {n} samples; "
                "expected the samples along an axis of the tensors that parameters meet. If each "
                "item of the dataset is a batch, pass `sample_ids=` to identify the samples in it."
            )

    def start_backward(self, receive: Receiver) -> None:
        """Deliver the gradients of the backward pass that begins now."""
        assert self._walk is not None
        self._receive = receive
        self._hook(self._walk.meetings)
        if self._walk.checkpoints:
            self._visited = {}
            self._watch_recomputation()

    def extra_backward(
        self,
        gradients: Sequence[tuple[GradientEdge, Tensor]],
        receive: Receiver,
        inputs: Sequence[Tensor] = (),
    ) -> None:
        """Run an extra backward pass before the actual one, deliver its rows, retain the graph.

        Args:
            gradients: Edges in the graph at which it starts, each with a gradient.
            receive: Called with the gradients of a parameter.
            inputs: Tensors whose gradients are computed too, for timing.
        """
        assert self._walk is not None
        edges, grads = [edge for edge, _ in gradients], [grad for _, grad in gradients]
        meetings = {meeting.node: meeting for meeting in self._walk.meetings}
        self._receive = receive
        try:
            with self.switch.others_paused():
                if inputs:
                    self._hook(self._walk.meetings)
                    torch.autograd.grad(edges, inputs, grads, retain_graph=True, allow_unused=True)
                    return
                backward_to_meetings(
                    edges,
                    grads,
                    self._walk,
                    self._walk.meetings,
                    lambda node, grads: self._deliver(node, self._inputs(meetings[node]), grads),
                )
        finally:
            self._receive = None
            self._remove_hooks()

    def end_backward(self) -> None:
        """Remove the hooks, and forget the graph."""
        self._receive, self._walk = None, None
        self._norms.end()
        self._visited = {}
        self._remove_hooks()

    def _remove_hooks(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _hook(self, meetings: Sequence[Meeting]) -> None:
        for meeting in meetings:
            self._handles.append(meeting.node.register_prehook(self._prehook(meeting)))

    def _prehook(self, meeting: Meeting) -> Callable[[tuple[Tensor | None, ...]], None]:
        node, inputs = meeting.node, self._inputs(meeting)

        def hook(grads: tuple[Tensor | None, ...]) -> None:
            if self._receive is not None and not self.switch.is_paused():
                start = 0.0 if self._clock is None else self._clock()
                self._deliver(node, inputs, grads)
                if self._clock is not None:
                    self.seconds += self._clock() - start

        return hook

    def _inputs(self, meeting: Meeting) -> list[tuple[int, Edge, Layout]]:
        """Return the parameter-only inputs of a meeting whose rows can be told apart."""
        known: Sequence[Any] = meeting.layouts or [UNKNOWN] * len(meeting.inputs)
        inputs = []
        for (position, edge), layout in zip(meeting.inputs, known, strict=True):
            if layout is UNKNOWN:
                layout = self._layouts.layout(meeting.node, position, edge)
            if self._is_subtracted(meeting, position):
                self._layouts.lose(edge, NO_EFFECT)
            elif layout is not None:
                inputs.append((position, edge, layout))
            elif meeting.shape:  # A penalty is added to a number: no sample's, and no rows.
                self._layouts.lose(edge, _no_owner(meeting))
        return inputs

    def _is_subtracted(self, meeting: Meeting, position: int) -> bool:
        """Return whether a batch norm subtracts what an input adds: a bias in front of it."""
        entry = None if self._walk is None else self._walk.normalized.get(meeting.node)
        if entry is None or not entry.by_batch:
            return False
        return position in _ADDENDS.get(type(meeting.node).__name__, ())

    def _deliver(
        self,
        node: Node,
        inputs: Sequence[tuple[int, Edge, Layout]],
        grads: tuple[Tensor | None, ...],
    ) -> None:
        if torch.is_grad_enabled():  # In a backward pass that builds a graph.
            with torch.no_grad():
                self._contribute(node, inputs, grads)
        else:
            self._contribute(node, inputs, grads)

    def _contribute(
        self,
        node: Node,
        inputs: Sequence[tuple[int, Edge, Layout]],
        grads: tuple[Tensor | None, ...],
    ) -> None:
        receive, n = self._receive, self._n
        if receive is None or n is None or all(grad is None for grad in grads):
            return
        rule = rule_for(node)
        self._norms.note(node, inputs, grads, n)
        for position, edge, layout in inputs:
            gradients: Iterable[ParameterGradient]
            if isinstance(layout, RoutedRows):
                call = NodeCall(node, grads, position, output_shape(edge), SINGLE_ROWS, n)
                gradients = self._routed(rule, call, edge, layout)
            else:
                call = NodeCall(node, grads, position, output_shape(edge), layout, n)
                through = self._norms.contribution(call, edge)
                contribution = rule.contribution(call) if through is None else through
                gradients = to_parameters(edge, contribution, self._recorded)
            for gradient in gradients:
                receive(gradient)

    def _routed(
        self, rule: NodeRule, call: NodeCall, edge: Edge, layout: RoutedRows
    ) -> Iterator[ParameterGradient]:
        owners = layout.owners(call.node, call.n, self.with_samples)
        if owners is None:
            return
        if rule.routed is not None:
            yield from to_parameters(edge, rule.routed(call, owners), self._recorded)
            return
        # Each row counts as a sample at first.
        single = replace(call, n=len(owners))
        for gradient in to_parameters(edge, rule.contribution(single), self._recorded):
            yield replace(gradient, owners=owners)

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
