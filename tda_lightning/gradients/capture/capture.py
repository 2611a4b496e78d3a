"""Capture: hooks on layers, and gradient factors handed out while backward runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from fnmatch import fnmatchcase
from types import TracebackType
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.utils.hooks import RemovableHandle

from tda_lightning.gradients.capture.broadcasting import Shared, watch_broadcasts
from tda_lightning.gradients.capture.checks import (
    require_batch,
    require_multiple,
    require_unchanged,
)
from tda_lightning.gradients.capture.paused import capture_paused, is_capturing
from tda_lightning.gradients.capture.tensor_hooks import hook_gradient
from tda_lightning.gradients.factors import GradientFactors
from tda_lightning.gradients.layers import (
    BlockSource,
    LayerCall,
    find_tensors,
    never_draws,
    random_state,
    sample_axis,
)
from tda_lightning.stores.recipe import SampleAxis

Receiver = Callable[[int, GradientFactors], None]
# A block's number, and what it hears of one layer.
_Listener = tuple[int, BlockSource]


class Capture:
    """Hooks on the recorded layers of a model; a context manager that attaches and detaches them.

    Hooks are active only between :meth:`start` and :meth:`end_backward`. Factors are delivered only
    between :meth:`start_backward` and :meth:`end_backward`, or by :meth:`extra_backward`. So the
    gradients that a training step takes itself (a gradient penalty, say) are not recorded.

    Args:
        sources: The layers that feed each block.
        batch_dims: Axis of the samples in the layers whose names match a pattern, where not 0.
        passes: Whether several backward passes may go through one graph.
    """

    def __init__(
        self,
        sources: Sequence[Sequence[BlockSource]],
        batch_dims: Mapping[str, SampleAxis],
        passes: Literal["one", "several"] = "one",
    ) -> None:
        self._listeners: dict[nn.Module, list[_Listener]] = {}
        for number, block_sources in enumerate(sources):
            for source in block_sources:
                self._listeners.setdefault(source.module, []).append((number, source))
        self._batch_dims = batch_dims
        self._handles: list[RemovableHandle] = []
        self._n: int | None = None
        self._receive: Receiver | None = None
        self._passes = passes
        self._rehearsing = False
        # Where in the graph the recorded layers' outputs are: a rehearsal goes no further.
        self._edges: list[GradientEdge] = []
        self._shared: list[Shared] = []
        self._random_states: dict[nn.Module, Tensor] = {}
        self._clock: Callable[[], float] | None = None
        self.seconds = 0.0

    def take_time(self, clock: Callable[[], float] | None) -> None:
        """From now on, add up in ``seconds`` how long deliveries take; or no longer."""
        self._clock, self.seconds = clock, 0.0

    def __enter__(self) -> Capture:
        """Attach the hooks."""
        for module, listeners in self._listeners.items():
            # In a compiled model: run the layer compiled, and the hook as it is.
            hook = torch.compiler.disable(self._forward_hook(listeners))  # type: ignore[no-untyped-call]
            self._handles.append(module.register_forward_hook(hook, with_kwargs=True))
            if any(source.rule.draws is not never_draws for _, source in listeners):
                remember = torch.compiler.disable(self._remember_random_state(listeners))  # type: ignore[no-untyped-call]
                self._handles.append(module.register_forward_pre_hook(remember))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None = None,
        error: BaseException | None = None,
        trace: TracebackType | None = None,
    ) -> None:
        """Remove every hook."""
        self.end_backward()
        self._edges, self._shared = [], []
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    @property
    def heard(self) -> Sequence[GradientEdge]:
        """Where in the graph the outputs are of the layers that were called since :meth:`start`."""
        return self._edges

    def start(self, n: int) -> None:
        """Watch the forward pass of a batch of ``n`` samples that begins now."""
        self._edges, self._shared = [], []
        self._n = n

    def go_on(self, n: int) -> None:
        """Watch the same batch again after :meth:`end_backward`: its graph is used once more."""
        self._n = n

    def end_forward(self, loss: Tensor) -> None:
        """Expect no more calls: the backward pass of this loss comes next, or a rehearsal of it."""
        assert self._n is not None
        shared, self._shared = self._shared, []
        alone = {tensor.edge for tensor in shared}
        with_samples = [edge for edge in self._edges if edge not in alone]
        watch_broadcasts(loss, shared, with_samples, self._n)

    def start_backward(self, receive: Receiver) -> None:
        """Deliver what the backward pass that begins now shows.

        Args:
            receive: Called with the number of a block and the factors of one call.
        """
        self._forget_graph()
        self._receive = receive

    def extra_backward(
        self,
        gradients: Sequence[tuple[GradientEdge, Tensor]],
        receive: Receiver,
        inputs: Sequence[Tensor] = (),
    ) -> None:
        """Deliver what other gradients would show, before the backward pass: its graph is kept.

        Args:
            gradients: Places on the graph, each with the gradient of what is there.
            receive: Called with the number of a block and the factors of one call.
            inputs: What to go back to; by default the recorded layers' outputs, so that no
                parameter's gradient is computed.
        """
        self._receive, self._rehearsing = receive, True
        try:
            with capture_paused(self):
                torch.autograd.grad(
                    [edge for edge, _ in gradients],
                    inputs or self._edges,
                    [grad for _, grad in gradients],
                    retain_graph=True,
                    allow_unused=True,
                )
        finally:
            self._receive, self._rehearsing = None, False

    def end_backward(self) -> None:
        """Watch nothing until the next :meth:`start`."""
        self._n = None
        self._receive = None
        self._forget_graph()

    def _forget_graph(self) -> None:
        if self._passes == "one":
            self._edges, self._shared = [], []

    def _keeps_heard(self) -> bool:
        return self._rehearsing or self._passes == "several"

    def _batch_dim(self, name: str) -> SampleAxis:
        return next((d for p, d in self._batch_dims.items() if fnmatchcase(name, p)), 0)

    def _remember_random_state(self, listeners: Sequence[_Listener]) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            is_heard = self._n is not None and is_capturing(self)
            if is_heard and listeners[0][1].rule.draws(module):
                self._random_states[module] = random_state(next(module.parameters()).device)

        return hook

    def _forward_hook(self, listeners: Sequence[_Listener]) -> Callable[..., None]:
        name = listeners[0][1].name
        is_flattened = self._batch_dim(name) == "flattened"
        declared = 0 if is_flattened else int(self._batch_dim(name))

        def hook(
            module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any
        ) -> None:
            if self._n is None or not torch.is_grad_enabled() or not is_capturing(self):
                return
            inputs = (
                [*find_tensors(args), *find_tensors(kwargs)] if kwargs else [*find_tensors(args)]
            )
            versions = [x._version for x in inputs]
            precision = _current_precision(output)
            for place, tensor in enumerate(find_tensors(output)):
                if not tensor.requires_grad:
                    continue
                axis = sample_axis(module, place, declared)
                is_shared = listeners[0][1].rule.is_shared(inputs[0], self._n)
                if is_flattened:
                    require_multiple(name, module, tensor, self._n)
                elif not is_shared:
                    require_batch(name, module, inputs, tensor, axis, self._n)
                heard = _Heard(
                    module,
                    args,
                    kwargs,
                    versions,
                    place,
                    0 if is_shared else axis,
                    precision,
                    self._random_states.get(module),
                )
                deliver = self._backward_hook(listeners, heard)
                hook_it = self._hook_shared if is_shared else hook_gradient
                edge = hook_it(tensor, inputs, deliver, name)
                if self._receive is None:  # What a checkpoint computes again is gone with its pass.
                    self._edges.append(edge)

        return hook

    def _hook_shared(
        self, tensor: Tensor, inputs: Sequence[Tensor], deliver: Callable[[Tensor], None], name: str
    ) -> GradientEdge:
        if self._n == 1:  # What one sample shares with nobody is its own.
            return hook_gradient(tensor, inputs, lambda grad: deliver(grad[None]), name)
        edge = get_gradient_edge(tensor)
        self._shared.append(Shared(name, edge, deliver))
        return edge

    def _backward_hook(
        self, listeners: Sequence[_Listener], heard: _Heard
    ) -> Callable[[Tensor], None]:
        # Autograd frees what a layer saved as soon as its backward pass is done, and so must we:
        # hooks live as long as the graph, and holding every input until then costs 20 % of a step.
        waiting = [heard]

        def hook(grad: Tensor) -> None:
            if self._receive is not None and waiting and is_capturing(self):
                found = waiting[0] if self._keeps_heard() else waiting.pop()
                begun = 0.0 if self._clock is None else self._clock()
                self._deliver(listeners, found, grad, self._receive)
                if self._clock is not None:
                    self.seconds += self._clock() - begun

        return hook

    def _deliver(
        self, listeners: Sequence[_Listener], heard: _Heard, grad: Tensor, receive: Receiver
    ) -> None:
        require_unchanged(listeners[0][1].name, heard.module, heard.inputs(), heard.versions)
        n = self._n
        assert n is not None
        with torch.no_grad(), capture_paused():  # The generic rule calls the module again.
            for number, source in listeners:
                with heard.precision:
                    factors = source.rule.factors(heard.call(source.names, grad))
                receive(number, factors.regrouped(n))


@dataclass(frozen=True)
class _Heard:
    """What a forward hook saw of one tensor in a layer's output."""

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    versions: list[int]
    place: int
    axis: int
    precision: AbstractContextManager[Any]
    random_state: Tensor | None

    def inputs(self) -> list[Tensor]:
        """Return the tensors that the layer was called with."""
        return [*find_tensors(self.args), *find_tensors(self.kwargs)]

    def call(self, names: tuple[str, ...], grad: Tensor) -> LayerCall:
        """Return the call, seen from its backward pass."""
        return LayerCall(
            self.module,
            self.args,
            self.kwargs,
            names,
            self.place,
            grad,
            self.axis,
            self.random_state,
        )


def _current_precision(output: Any) -> AbstractContextManager[Any]:
    """Return the autocast that is on now: backward runs without it, and rules may call layers."""
    device = next(find_tensors(output)).device.type
    if not torch.is_autocast_enabled(device):
        return nullcontext()
    return torch.autocast(device, torch.get_autocast_dtype(device))
