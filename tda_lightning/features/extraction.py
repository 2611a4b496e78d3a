"""Extract the features of one layer: its inputs, in one pass over the data in evaluation mode.

No recorded run is needed. Batches go through the user's own ``training_step``, whose loss also
yields the gradients at the layer's output. The model is left unchanged.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from tda_lightning.features.layer_features import HeadOutputs, LayerFeatures, concatenate
from tda_lightning.passes.batch_contents import batch_size, find_tensors, require_batches
from tda_lightning.passes.batches import (
    loss_of,
    named_batches,
    require_loader,
    step_errors,
    step_of,
    transfer,
)
from tda_lightning.passes.model_state import (
    gpus_of,
    preserved_rng,
    preserved_state,
    require_finite_weights,
    require_model,
)
from tda_lightning.passes.query_batches import identified
from tda_lightning.recording.sample_ids import IdSource, SampleLedger, require_once
from tda_lightning.stores.arguments import describe, require_choice

Reads = Literal["features", "head"]


def train_features(
    model: nn.Module,
    loader: DataLoader[Any],
    *,
    layer: str | None = None,
    reads: Reads = "features",
    sample_ids: IdSource | None = None,
    progress: bool = True,
) -> LayerFeatures:
    """Extract the features of the training data, in one pass over a loader.

    Args:
        model: A LightningModule, with the weights to use. It is left unchanged.
        loader: The training data, in any order.
        layer: Name of the layer whose inputs are the features; by default the last ``Linear`` that
            is called.
        reads: ``"head"`` also extracts the layer's outputs and the gradients there. Every batch
            then passes twice, once with random outputs, to infer the loss.
        sample_ids: A key of the batch that holds the sample ids, or a function from the batch to
            ids. By default, ids come from the loader's sampler.
        progress: Show a progress bar.

    Returns:
        The layer features, on the CPU, sorted by id.

    Raises:
        ValueError: If the layer or the ids cannot be found, or ``training_step`` cannot take a
            batch.
    """
    require_loader(loader, "train_loader")
    parts, ids = [], []
    named = named_batches(SampleLedger(sample_ids), loader, "features", progress)
    with named as batches, _feature_hooks(model, layer, reads) as hooks:
        for batch_ids, batch in batches:
            ids.append(batch_ids)
            parts.append(hooks.extract(batch, "train_loader", batch_ids))
    require_batches(parts, "train_loader")
    layer_features = concatenate(parts, torch.cat(ids), "train_loader")
    require_once(layer_features.ids)
    layer_features = layer_features.sorted()
    _require_finite(layer_features, model, "train_loader")
    return layer_features


def query_features(
    model: nn.Module,
    queries: Any,
    *,
    layer: str | None = None,
    reads: Reads = "features",
    progress: bool = True,
) -> LayerFeatures:
    """Extract the features of queries; see :func:`train_features`.

    Args:
        model: A LightningModule, with the weights to use. It is left unchanged.
        queries: A batch as the training loader yields it, or a ``DataLoader`` of such batches.
        layer: Name of the layer whose inputs are the features; by default the last ``Linear`` that
            is called.
        reads: ``"head"`` also extracts the layer's outputs and the gradients there.
        progress: Show a progress bar over the batches of a loader.
    """
    with _feature_hooks(model, layer, reads) as hooks:
        batches = identified(queries, progress=progress)
        pairs = [(ids, hooks.extract(batch, "queries", ids)) for ids, batch in batches]
    require_batches(pairs, "queries")
    known = [ids for ids, _ in pairs if ids is not None]
    ids = torch.cat(known) if len(known) == len(pairs) else None
    layer_features = concatenate([part for _, part in pairs], ids, "queries")
    _require_finite(layer_features, model, "queries")
    return layer_features


@contextmanager
def _feature_hooks(model: nn.Module, layer: str | None, reads: Reads) -> Iterator[_FeatureHooks]:
    require_model(model)
    require_choice("reads", reads, Reads)
    hooks = _FeatureHooks(model, layer, reads)
    try:
        with preserved_state(model, "eval"), torch.set_grad_enabled(reads == "head"):
            yield hooks
    finally:
        hooks.detach()


@dataclass(frozen=True)
class _Call:
    """Inputs and outputs of a layer; in a head, the outputs are a leaf of the graph."""

    name: str
    module: nn.Module
    inputs: Tensor
    outputs: Tensor


class _FeatureHooks:
    """Hooks on the candidate layers that store the last call."""

    def __init__(self, model: nn.Module, layer: str | None, reads: Reads) -> None:
        self._model, self._layer, self._reads = model, layer, reads
        self._last_call: _Call | None = None
        self._inputs: Tensor | None = None
        self._probed_layer: str | None = None
        self._handles = []
        for name, module in _candidate_layers(model, layer).items():
            self._handles += [
                module.register_forward_pre_hook(self._store_inputs, with_kwargs=True),
                module.register_forward_hook(self._forward_hook(name)),
            ]

    def detach(self) -> None:
        for handle in self._handles:
            handle.remove()

    def extract(self, batch: Any, argument: str, ids: Tensor | None = None) -> LayerFeatures:
        """Return the layer features of a batch, with positions in the batch as ids."""
        n = batch_size(batch, argument, ids)
        self._last_call = None
        step = f"{type(self._model).__name__}.training_step"
        failure = f"Cannot extract features of `{argument}` with `{step}`"
        read = self._read_head if self._reads == "head" else self._read_features
        try:
            with step_errors(failure, batch, self._model):
                return read(transfer(self._model, batch), n)
        finally:
            self._last_call = self._inputs = None

    def _store_inputs(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        inputs = next(find_tensors([args, kwargs]), None)
        # Copied before the call, since a layer may overwrite its inputs.
        self._inputs = None if inputs is None else inputs.detach().clone()

    def _forward_hook(self, name: str) -> Callable[..., Tensor | None]:
        def hook(module: nn.Module, args: Any, output: Any) -> Tensor | None:
            if self._inputs is None:
                return None
            if self._reads == "features" or not isinstance(module, nn.Linear):
                self._last_call = _Call(name, module, self._inputs, self._inputs)
                return None
            is_probed = name == self._probed_layer
            leaf = (_random_like(output) if is_probed else output.detach()).requires_grad_()
            self._last_call = _Call(name, module, self._inputs, leaf)
            return leaf.clone()  # the training step may overwrite it

        return hook

    def _require_call(self, n: int) -> _Call:
        call = self._last_call
        if call is None:
            layer = "a `Linear`" if self._layer is None else f"`{self._layer}`"
            raise ValueError(f"`training_step` never calls {layer}; choose a layer that it calls.")
        if call.inputs.ndim < 2 or len(call.inputs) != n:
            raise ValueError(
                f"`{call.name}` received {describe(call.inputs)} in a batch of {n} samples; "
                "expected the samples along its first axis. Name another layer with `layer=`."
            )
        return call

    def _read_features(self, batch: Any, n: int) -> LayerFeatures:
        step_of(self._model, batch)
        call = self._require_call(n)
        if not call.inputs.is_floating_point():
            raise ValueError(
                f"`{call.name}` is a {type(call.module).__name__} and received "
                f"{describe(call.inputs)}; expected a layer with floating-point inputs. Name a "
                "later one with `layer=`."
            )
        return LayerFeatures(call.inputs.flatten(1).cpu(), torch.arange(n), call.name)

    def _read_head(self, batch: Any, n: int) -> LayerFeatures:
        call, gradients = self._gradients(batch, n, probed=None)
        probe, probe_gradients = self._gradients(batch, n, probed=call.name)
        weight, features = _with_bias(_require_head(call), call.inputs)
        head = HeadOutputs(
            outputs=call.outputs.detach().cpu(),
            gradients=gradients.cpu(),
            probes=probe.outputs.detach().cpu(),
            probe_gradients=probe_gradients.cpu(),
            weight=weight.cpu(),
            rounding=torch.finfo(gradients.dtype).eps,
        )
        return LayerFeatures(features.cpu(), torch.arange(n), call.name, head)

    def _gradients(self, batch: Any, n: int, probed: str | None) -> tuple[_Call, Tensor]:
        """Return the last call, and the gradient of each sample's loss at its outputs."""
        self._probed_layer = probed
        # A step that draws random numbers must draw the same ones in both passes.
        with preserved_rng(gpus_of(self._model)):
            loss = loss_of(self._model, batch)
        call = self._require_call(n)
        _require_head(call)
        # Assumes that the loss of a batch is the mean of its samples' losses.
        (gradients,) = torch.autograd.grad(n * loss, call.outputs)
        return call, gradients


def _candidate_layers(model: nn.Module, layer: str | None) -> dict[str, nn.Module]:
    modules = dict(model.named_modules())
    if layer is None:
        return {name: module for name, module in modules.items() if isinstance(module, nn.Linear)}
    if layer not in modules or not layer:
        raise ValueError(
            f"`layer` is {layer!r}, which is no layer of `{type(model).__name__}`; expected one of "
            f"{[name for name in modules if name]}. Choose one, or leave `layer` out to use the "
            "last `Linear`."
        )
    return {layer: modules[layer]}


def _require_head(call: _Call) -> nn.Linear:
    if not isinstance(call.module, nn.Linear) or call.inputs.ndim != 2:
        raise ValueError(
            f"`{call.name}` is a {type(call.module).__name__} and received "
            f"{describe(call.inputs)}; expected a `Linear` that is called with one vector per "
            "sample. Name it with `layer=`."
        )
    return call.module


def _random_like(outputs: Tensor) -> Tensor:
    """Return random outputs, at which the gradient of the loss is taken as well."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(outputs.shape, generator=generator).to(outputs)


def _with_bias(head: nn.Linear, inputs: Tensor) -> tuple[Tensor, Tensor]:
    weight = head.weight.detach().clone()
    if head.bias is None:
        return weight, inputs
    ones = inputs.new_ones(len(inputs), 1)
    return torch.cat([weight, head.bias.detach()[:, None]], 1), torch.cat([inputs, ones], 1)


def _require_finite(layer_features: LayerFeatures, model: nn.Module, argument: str) -> None:
    non_finite = layer_features.first_non_finite()
    if non_finite is None:
        return
    require_finite_weights(model)
    description, sample = non_finite
    raise ValueError(
        f"In sample {sample} of `{argument}`, {description} is not finite, though the weights are; "
        "expected finite numbers. Look for NaN or infinity in its inputs and targets."
    )
