"""Capture: hook the recorded layers, and deliver their gradient factors during backward."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from types import TracebackType
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.utils.hooks import RemovableHandle

from tda_lightning.gradients.capture.broadcasting import Shared, hook_broadcasts
from tda_lightning.gradients.capture.hooks import hook_gradient
from tda_lightning.gradients.capture.layer_output import (
    LayerOutput,
    current_autocast,
    require_batch,
    require_multiple,
    require_unchanged,
)
from tda_lightning.gradients.capture.pausing import PauseSwitch
from tda_lightning.gradients.factors import GradientFactors
from tda_lightning.gradients.layers import (
    BlockSource,
    find_tensors,
    never_draws,
    random_state,
    sample_axis,
)
from tda_lightning.stores.recipe import SampleAxis

Receiver = Callable[[int, GradientFactors], None]
# The number of a block, and one layer that feeds it.
_NumberedSource = tuple[int, BlockSource]


class Capture:
    """Hooks on the recorded layers of a model; a context manager that attaches and removes them.

    Hooks are active only between :meth:`start` and :meth:`end_backward`. Factors are delivered only
    between :meth:`start_backward` and :meth:`end_backward`, or by :meth:`extra_backward`. So the
    gradients that a training step computes itself (such as a gradient penalty) are not recorded.

    Args:
        model: The model.
        sources: The layers that feed each block.
        batch_dims: Axis of the samples in the layers whose names match a pattern, where not 0.
        passes: Whether several backward passes may go through one graph.

    Attributes:
        switch: Pauses this capture and the model's others during extra passes through the model.
    """

    def __init__(
        self,
        model: nn.Module,
        sources: Sequence[Sequence[BlockSource]],
        batch_dims: Mapping[str, SampleAxis],
        passes: Literal["one", "several"] = "one",
    ) -> None:
        self.switch = PauseSwitch(model)
        self._sources: dict[nn.Module, list[_NumberedSource]] = {}
        for number, block_sources in enumerate(sources):
            for source in block_sources:
                self._sources.setdefault(source.module, []).append((number, source))
        self._batch_dims = batch_dims
        self._handles: list[RemovableHandle] = []
        self._n: int | None = None
        self._receive: Receiver | None = None
        self._passes = passes
        self._in_extra_backward = False
        # The recorded layers' outputs in the graph: an extra backward pass stops there.
        self._output_edges: list[GradientEdge] = []
        self._shared: list[Shared] = []
        self._random_states: dict[nn.Module, Tensor] = {}
        self._clock: Callable[[], float] | None = None
        self.seconds = 0.0

    def take_time(self, clock: Callable[[], float] | None) -> None:
        """Reset ``seconds``, and add up the time of deliveries in it; ``None`` stops that."""
        self._clock, self.seconds = clock, 0.0

    def __enter__(self) -> Capture:
        """Attach the hooks."""
        self.switch.attach()
        for module, sources in self._sources.items():
            # In a compiled model, the layer runs compiled and the hook does not.
            hook = torch.compiler.disable(self._forward_hook(sources))  # type: ignore[no-untyped-call]
            self._handles.append(module.register_forward_hook(hook, with_kwargs=True))
            if any(source.rule.draws is not never_draws for _, source in sources):
                pre_hook = torch.compiler.disable(self._random_state_hook(sources))  # type: ignore[no-untyped-call]
                self._handles.append(module.register_forward_pre_hook(pre_hook))
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
        self._output_edges, self._shared = [], []
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    @property
    def output_edges(self) -> Sequence[GradientEdge]:
        """Graph edges of the outputs of all layers that were called since :meth:`start`."""
        return self._output_edges

    def start(self, n: int) -> None:
        """Activate the hooks for the forward pass of a batch of ``n`` samples."""
        self._output_edges, self._shared = [], []
        self._n = n

    def continue_batch(self, n: int) -> None:
        """Activate the hooks after :meth:`end_backward`, for another pass through the graph."""
        self._n = n

    def end_forward(self, loss: Tensor) -> None:
        """Prepare for the backward pass of ``loss``, or an extra one, after the last layer call."""
        assert self._n is not None
        shared, self._shared = self._shared, []
        shared_edges = {tensor.edge for tensor in shared}
        with_samples = [edge for edge in self._output_edges if edge not in shared_edges]
        hook_broadcasts(loss, shared, with_samples, self._n)

    def start_backward(self, receive: Receiver) -> None:
        """Deliver the factors of the backward pass that begins now.

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
        """Run an extra backward pass before the actual one, deliver its factors, retain the graph.

        Args:
            gradients: Edges in the graph at which it starts, each with a gradient.
            receive: Called with the number of a block and the factors of one call.
            inputs: Tensors at which it stops. By default these are the recorded layers' outputs, so
                that no parameter's gradient is computed.
        """
        self._receive, self._in_extra_backward = receive, True
        try:
            with self.switch.others_paused():
                torch.autograd.grad(
                    [edge for edge, _ in gradients],
                    inputs or self._output_edges,
                    [grad for _, grad in gradients],
                    retain_graph=True,
                    allow_unused=True,
                )
        finally:
            self._receive, self._in_extra_backward = None, False

    def end_backward(self) -> None:
        """Deactivate the hooks until the next :meth:`start`."""
        self._n = None
        self._receive = None
        self._forget_graph()

    def _forget_graph(self) -> None:
        if self._passes == "one":
            self._output_edges, self._shared = [], []

    def _expects_another_pass(self) -> bool:
        return self._in_extra_backward or self._passes == "several"

    def _batch_dim(self, name: str) -> SampleAxis:
        return next((d for p, d in self._batch_dims.items() if fnmatchcase(name, p)), 0)

    def _random_state_hook(self, sources: Sequence[_NumberedSource]) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            is_active = self._n is not None and not self.switch.is_paused()
            if is_active and sources[0][1].rule.draws(module):
                self._random_states[module] = random_state(next(module.parameters()).device)

        return hook

    def _forward_hook(self, sources: Sequence[_NumberedSource]) -> Callable[..., None]:
        name = sources[0][1].name
        is_flattened = self._batch_dim(name) == "flattened"
        declared = 0 if is_flattened else int(self._batch_dim(name))

        def hook(
            module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any
        ) -> None:
            if self._n is None or not torch.is_grad_enabled() or self.switch.is_paused():
                return
            inputs = (
                [*find_tensors(args), *find_tensors(kwargs)] if kwargs else [*find_tensors(args)]
            )
            versions = [x._version for x in inputs]
            autocast = current_autocast(output)
            for place, tensor in enumerate(find_tensors(output)):
                if not tensor.requires_grad:
                    continue
                axis = sample_axis(module, place, declared)
                is_shared = sources[0][1].rule.is_shared(inputs[0], self._n)
                if is_flattened:
                    require_multiple(name, module, tensor, self._n)
                elif not is_shared:
                    require_batch(name, module, inputs, tensor, axis, self._n)
                layer_output = LayerOutput(
                    module,
                    args,
                    kwargs,
                    versions,
                    place,
                    0 if is_shared else axis,
                    autocast,
                    self._random_states.get(module),
                )
                deliver = self._gradient_hook(sources, layer_output)
                register = self._hook_shared if is_shared else hook_gradient
                edge = register(tensor, inputs, deliver, name)
                if self._receive is None:  # A checkpoint's recomputed graph ends with its pass.
                    self._output_edges.append(edge)

        return hook

    def _hook_shared(
        self, tensor: Tensor, inputs: Sequence[Tensor], deliver: Callable[[Tensor], None], name: str
    ) -> GradientEdge:
        if self._n == 1:  # A batch of one sample broadcasts nothing.
            return hook_gradient(tensor, inputs, lambda grad: deliver(grad[None]), name)
        edge = get_gradient_edge(tensor)
        self._shared.append(Shared(name, edge, deliver))
        return edge

    def _gradient_hook(
        self, sources: Sequence[_NumberedSource], layer_output: LayerOutput
    ) -> Callable[[Tensor], None]:
        # Autograd frees a layer's saved tensors as soon as its backward pass is done, and so must
        # we: hooks live as long as the graph, and holding all inputs until then costs 20 % of a
        # step.
        pending = [layer_output]

        def hook(grad: Tensor) -> None:
            if self._receive is not None and pending and not self.switch.is_paused():
                current = pending[0] if self._expects_another_pass() else pending.pop()
                start = 0.0 if self._clock is None else self._clock()
                self._deliver(sources, current, grad, self._receive)
                if self._clock is not None:
                    self.seconds += self._clock() - start

        return hook

    def _deliver(
        self,
        sources: Sequence[_NumberedSource],
        layer_output: LayerOutput,
        grad: Tensor,
        receive: Receiver,
    ) -> None:
        name, module = sources[0][1].name, layer_output.module
        require_unchanged(name, module, layer_output.inputs(), layer_output.versions)
        n = self._n
        assert n is not None
        with torch.no_grad(), self.switch.paused():  # The generic rule calls the module again.
            for number, source in sources:
                with layer_output.autocast:
                    factors = source.rule.factors(layer_output.call(source.names, grad))
                receive(number, factors.regrouped(n))
