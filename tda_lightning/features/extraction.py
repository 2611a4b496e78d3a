"""Features: what a layer sees of each sample, in one pass over data, in evaluation mode.

Batches go through the user's own ``training_step``, whose loss also says what each sample asks of
the layer's output. The model is left as it was.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from tda_lightning.arguments import require_choice
from tda_lightning.features.layer_features import HeadOutputs, LayerFeatures, concatenate
from tda_lightning.gradients.layers import find_tensors
from tda_lightning.passes.batches import (
    batch_size,
    batches_of,
    describe,
    require_loader,
    with_progress,
)
from tda_lightning.passes.model_state import cuda_devices, preserved_rng, preserved_state
from tda_lightning.passes.training_step import (
    loss_of,
    require_finite_weights,
    require_model,
    step_of,
    transfer,
)
from tda_lightning.recording.sample_ids import IdSource, SampleLedger, require_once

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
    """Take the features of training data, in one pass over a loader.

    Args:
        model: A LightningModule, with the weights to ask about. It is left as it was.
        loader: The training data, in any order.
        layer: Name of the layer whose input to take; by default the last ``Linear`` that is called.
        reads: ``"head"`` takes the layer's output and the gradients there as well: every batch
            passes twice, once with random outputs in their place, which tells losses apart.
        sample_ids: Where a batch has its samples' ids; by default learnt from the sampler.
        progress: Show a progress bar.

    Returns:
        The points, on the CPU, sorted by id.

    Raises:
        ValueError: If the layer or the ids cannot be found, or ``training_step`` cannot take a
            batch.
    """
    require_loader(loader, "train_loader")
    ledger = SampleLedger(sample_ids)
    ledger.watch(loader, lambda: True)
    parts, ids = [], []
    try:
        with _watching(model, layer, reads) as watch:
            for number, batch in enumerate(with_progress(loader, "features", progress)):
                ids.append(ledger.name(batch, number))
                parts.append(watch.take(batch, "train_loader"))
    finally:
        ledger.release()
    layer_features = _joined(parts, torch.cat(ids) if ids else None, "train_loader")
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
    """Take the features of queries; see :func:`train_features`.

    Args:
        model: A LightningModule, with the weights to ask about. It is left as it was.
        queries: A batch as the training loader yields them, or a ``DataLoader`` of such batches.
        layer: Name of the layer whose input to take; by default the last ``Linear`` that is called.
        reads: ``"head"`` takes the layer's output and the gradients there as well.
        progress: Show a progress bar over the batches of a loader.
    """
    with _watching(model, layer, reads) as watch:
        batches = with_progress(batches_of(queries), "queries", progress)
        layer_features = _joined(
            [watch.take(batch, "queries") for batch in batches], None, "queries"
        )
    _require_finite(layer_features, model, "queries")
    return layer_features


@contextmanager
def _watching(model: nn.Module, layer: str | None, reads: Reads) -> Iterator[_Watch]:
    require_model(model)
    require_choice("reads", reads, Reads)
    watch = _Watch(model, layer, reads)
    try:
        with preserved_state(model, "eval"), torch.set_grad_enabled(reads == "head"):
            yield watch
    finally:
        watch.detach()


@dataclass(frozen=True)
class _Call:
    """What a layer saw, and what it returned: a leaf of the graph, where its head is read."""

    name: str
    module: nn.Module
    inputs: Tensor
    outputs: Tensor


class _Watch:
    """Hooks on the layers that may be meant, which remember the last call."""

    def __init__(self, model: nn.Module, layer: str | None, reads: Reads) -> None:
        self._model, self._reads = model, reads
        self._last: _Call | None = None
        self._seen: Tensor | None = None
        self._probed: str | None = None
        self._chosen = layer
        self._handles = []
        for name, module in _layers_meant(model, layer).items():
            self._handles += [
                module.register_forward_pre_hook(self._see, with_kwargs=True),
                module.register_forward_hook(self._hook(name)),
            ]

    def detach(self) -> None:
        for handle in self._handles:
            handle.remove()

    def take(self, batch: Any, argument: str) -> LayerFeatures:
        """Return the points of a batch; their ids are their places in it."""
        n = batch_size(batch, argument)
        self._last = None
        try:
            step = self._read_head if self._reads == "head" else self._read_features
            return step(transfer(self._model, batch), n)
        except (RuntimeError, ValueError, TypeError, LookupError) as error:
            raise ValueError(
                f"No features could be taken of `{argument}` in `{type(self._model).__name__}."
                f"training_step`: expected a batch such as the training loader yields; got "
                f"{describe(batch)}, and the step said: {error}"
            ) from error
        finally:
            self._last = self._seen = None

    def _see(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        inputs = next(find_tensors([args, kwargs]), None)
        # A copy, made beforehand, since layers may write over what they see.
        self._seen = None if inputs is None else inputs.detach().clone()

    def _hook(self, name: str) -> Callable[..., Tensor | None]:
        def hook(module: nn.Module, args: Any, output: Any) -> Tensor | None:
            if self._seen is None:
                return None
            if self._reads == "features" or not isinstance(module, nn.Linear):
                self._last = _Call(name, module, self._seen, self._seen)
                return None
            leaf = (_drawn(output) if name == self._probed else output.detach()).requires_grad_()
            self._last = _Call(name, module, self._seen, leaf)
            return leaf.clone()  # which the step may write over

        return hook

    def _heard(self, n: int) -> _Call:
        if self._last is None:
            meant = "no Linear" if self._chosen is None else f"not `{self._chosen}`"
            raise ValueError(f"the step called {meant}; expected a layer that it calls")
        if self._last.inputs.ndim < 2 or len(self._last.inputs) != n:
            raise ValueError(
                f"`{self._last.name}` saw {describe(self._last.inputs)} in a batch of {n} samples; "
                "expected the samples along its first axis. Name another layer with `layer=`"
            )
        return self._last

    def _read_features(self, batch: Any, n: int) -> LayerFeatures:
        step_of(self._model, batch)
        call = self._heard(n)
        if not call.inputs.is_floating_point():
            raise ValueError(
                f"`{call.name}` is a {type(call.module).__name__} and saw {describe(call.inputs)}; "
                "expected a layer that sees floating-point numbers. Name one behind it with "
                "`layer=`"
            )
        return LayerFeatures(call.inputs.flatten(1).cpu(), torch.arange(n), call.name)

    def _read_head(self, batch: Any, n: int) -> LayerFeatures:
        call, gradients = self._ask(batch, n, probed=None)
        probe, probe_gradients = self._ask(batch, n, probed=call.name)
        weight, features = _with_bias(_require_head(call), call.inputs)
        asked = HeadOutputs(
            outputs=call.outputs.detach().cpu(),
            gradients=gradients.cpu(),
            probes=probe.outputs.detach().cpu(),
            probe_gradients=probe_gradients.cpu(),
            weight=weight.cpu(),
            rounding=torch.finfo(gradients.dtype).eps,
        )
        return LayerFeatures(features.cpu(), torch.arange(n), call.name, asked)

    def _ask(self, batch: Any, n: int, probed: str | None) -> tuple[_Call, Tensor]:
        """Return the last call, and what each sample's loss asks of its outputs."""
        self._probed = probed
        # A step that draws random numbers draws the same ones when it is asked again.
        with preserved_rng(cuda_devices(self._model)):
            loss = loss_of(self._model, batch)
        call = self._heard(n)
        _require_head(call)
        # The loss of a batch is taken to be the mean of its samples' losses.
        (gradients,) = torch.autograd.grad(n * loss, call.outputs)
        return call, gradients


def _layers_meant(model: nn.Module, layer: str | None) -> dict[str, nn.Module]:
    named = dict(model.named_modules())
    if layer is None:
        return {name: one for name, one in named.items() if isinstance(one, nn.Linear)}
    if layer not in named or not layer:
        raise ValueError(
            f"`layer` names `{layer}`, which `{type(model).__name__}` has not; expected one of "
            f"{[name for name in named if name]}. Choose one, or leave `layer` out for the last "
            "`Linear`."
        )
    return {layer: named[layer]}


def _require_head(call: _Call) -> nn.Linear:
    if not isinstance(call.module, nn.Linear) or call.inputs.ndim != 2:
        raise ValueError(
            f"`{call.name}` is a {type(call.module).__name__} and saw {describe(call.inputs)}; "
            "expected a `Linear` that is called with one vector per sample. Name it with `layer=`"
        )
    return call.module


def _drawn(outputs: Tensor) -> Tensor:
    """Return outputs that a loss is asked about besides the layer's own."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(outputs.shape, generator=generator).to(outputs)


def _with_bias(head: nn.Linear, inputs: Tensor) -> tuple[Tensor, Tensor]:
    weight = head.weight.detach().clone()
    if head.bias is None:
        return weight, inputs
    ones = inputs.new_ones(len(inputs), 1)
    return torch.cat([weight, head.bias.detach()[:, None]], 1), torch.cat([inputs, ones], 1)


def _joined(parts: Sequence[LayerFeatures], ids: Tensor | None, argument: str) -> LayerFeatures:
    if not parts:
        raise ValueError(f"`{argument}` is an empty loader; expected at least one batch.")
    widths = {part.features.shape[1] for part in parts}
    if len(widths) > 1:
        raise ValueError(
            f"`{parts[0].layer}` saw {sorted(widths)} numbers of samples of `{argument}`; expected "
            "as many of each. Pad all batches alike, or name a layer behind the pooling."
        )
    n = sum(len(part.ids) for part in parts)
    return concatenate(parts, torch.arange(n) if ids is None else ids)


def _require_finite(layer_features: LayerFeatures, model: nn.Module, argument: str) -> None:
    strange = layer_features.not_finite()
    if strange is None:
        return
    require_finite_weights(model)
    what, sample = strange
    raise ValueError(
        f"In sample {sample} of `{argument}`, {what} is not finite, though the weights are; "
        "expected finite numbers. Look for NaN or infinity in its inputs and targets."
    )
