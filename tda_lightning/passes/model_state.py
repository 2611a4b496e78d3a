"""A user's model in a pass: check it, hash its weights, and preserve its state."""

from __future__ import annotations

import copy
import hashlib
import random
import warnings
from collections import deque
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from tda_lightning.gradients.capture.pausing import claimed
from tda_lightning.gradients.parameter_selection import clean_name
from tda_lightning.passes.stand_ins import idle_optimization, muted_logging

# Pairs of fingerprints; a filter of `warnings` would repeat itself after every `catch_warnings`.
_WARNED: set[tuple[str, str]] = set()
# Whether a model is in evaluation or training mode during a pass.
Mode = Literal["eval", "train"]


def require_model(model: Any) -> None:
    """Check that an object is a module with a ``training_step``."""
    if not isinstance(model, nn.Module) or not hasattr(model, "training_step"):
        description = repr(model) if isinstance(model, type) else f"a `{type(model).__name__}`"
        raise ValueError(
            f"`model` is {description}; expected the LightningModule that was trained: an object "
            "with a `training_step`."
        )


def require_finite_weights(model: nn.Module) -> None:
    """Check that no weight of a model is NaN or infinite."""
    for name, weight in model.named_parameters():
        if not weight.isfinite().all():
            raise ValueError(
                f"The weights of `model` are not finite: `{name}` holds NaN or infinity. Expected "
                "weights from a training that did not diverge; load an earlier checkpoint."
            )


def fingerprint(model: nn.Module) -> str:
    """Return a short hash of a model's weights, and of the running statistics it stores."""
    digest = hashlib.sha256()
    for tensor in (*model.parameters(), *_stored_statistics(model)):
        raw = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)
        digest.update(raw.numpy().tobytes())
    return digest.hexdigest()[:12]


def _stored_statistics(model: nn.Module) -> Iterator[Tensor]:
    """Yield the floating-point buffers in a model's ``state_dict``."""
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.is_floating_point() and name not in module._non_persistent_buffers_set:
                yield buffer


def warn_of_other_weights(
    model: nn.Module,
    expected: str | None,
    *,
    remedy: str = ', or pass `at="model"` if you mean these weights',
    stacklevel: int = 3,
) -> None:
    """Warn once if a model does not have the weights at the end of the recorded training.

    ``expected`` is their fingerprint, ``None`` if unknown. ``remedy`` is what else to do than
    loading the last checkpoint.
    """
    require_model(model)
    if expected is None or (actual := fingerprint(model)) == expected:
        return
    if (actual, expected) not in _WARNED:
        _WARNED.add((actual, expected))
        warnings.warn(
            f"The weights or running statistics of `model` ({actual}) are not those at the end of "
            f"the recorded training ({expected}); expected the trained model. Load its last "
            f"checkpoint{remedy}.",
            stacklevel=stacklevel,
        )


@contextmanager
def preserved_state(model: nn.Module, mode: Mode) -> Iterator[None]:
    """Put the model into ``mode`` with logging muted, and restore its state afterwards."""
    with ExitStack() as stack:
        stack.enter_context(preserved_rng(gpus_of(model)))
        for context in (
            _preserved_parameters,
            _preserved_attributes,
            _preserved_modes,
            preserved_metrics,
            _trainer_in_training,
            idle_optimization,
            muted_logging,
        ):
            stack.enter_context(context(model))
        model.train(mode == "train")
        yield


def gpus_of(model: nn.Module) -> list[torch.device]:
    """Return the GPUs on which a model has parameters."""
    return list({p.device for p in model.parameters() if p.device.type in ("cuda", "xpu", "mps")})


@contextmanager
def swapped_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> Iterator[None]:
    """Load other weights and buffers into the model, and restore the original ones afterwards.

    Raises:
        ValueError: If names or shapes differ from those of the model.
        RuntimeError: If another thread is recording or querying the model.
    """
    state, name = _tensors_of(model), differing_weight(model, weights)
    if name is not None:
        raise ValueError(
            f"The weights do not fit the `{type(model).__name__}`: expected `{name}` of shape "
            f"{_shape(state.get(name))}, got {_shape(weights.get(name))}. Pass the model that was "
            "trained."
        )
    with claimed(model):
        originals = {name: tensor.detach().clone() for name, tensor in state.items()}
        try:
            _copy(state, weights)
            yield
        finally:
            _copy(state, originals)


def differing_weight(model: nn.Module, weights: Mapping[str, Tensor]) -> str | None:
    """Return the name of a weight or buffer that has another shape in the model, or is missing."""
    state = _tensors_of(model)
    differing = [n for n in {*state, *weights} if _shape(state.get(n)) != _shape(weights.get(n))]
    return min(differing) if differing else None


def _tensors_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: value for name, value in model.state_dict().items() if isinstance(value, Tensor)}


def _shape(tensor: Tensor | None) -> tuple[int, ...] | None:
    return None if tensor is None else tuple(tensor.shape)


def _copy(targets: Mapping[str, Tensor], sources: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        for name, tensor in targets.items():
            tensor.copy_(sources[name])


@contextmanager
def preserved_rng(devices: Sequence[torch.device] = ()) -> Iterator[None]:
    """Restore the random states of torch, of some GPUs, of NumPy and of Python afterwards."""
    python_state, numpy_state = random.getstate(), np.random.get_state()
    # Apple's only GPU is not named.
    places = [(getattr(torch, d.type), () if d.type == "mps" else (d,)) for d in devices]
    states = [module.get_rng_state(*place) for module, place in places]
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        for (module, place), state in zip(places, states, strict=True):
            module.set_rng_state(state, *place)
        random.setstate(python_state)
        np.random.set_state(numpy_state)


@contextmanager
def _preserved_attributes(model: nn.Module) -> Iterator[None]:
    """Restore counters, buffers and other attributes, also those that a step changes in place.

    The buffers of a module are one of its dictionaries, in which a step may put another tensor.
    """
    attributes = [vars(module) for module in model.modules()]
    originals = [dict(current) for current in attributes]
    values = [value for original in originals for value in original.values()]
    containers = [(v, copy.copy(v)) for v in values if type(v) in (list, dict, deque)]
    tensors = [*model.buffers(), *(value for value in values if type(value) is Tensor)]
    saved = [(tensor, tensor.detach().clone()) for tensor in tensors if not tensor.is_inference()]
    try:
        yield
    finally:
        for current, original in zip(attributes, originals, strict=True):
            current.update(original)
        for container, content in containers:
            if list(map(id, _entries(container))) != list(map(id, _entries(content))):
                container.clear()
                (container.update if isinstance(container, dict) else container.extend)(content)
        with torch.no_grad():
            for tensor, numbers in saved:
                if not torch.equal(tensor, numbers):
                    tensor.copy_(numbers)


def _entries(container: Any) -> list[Any]:
    return [*container, *(container.values() if isinstance(container, dict) else ())]


@contextmanager
def _preserved_modes(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def thawed(model: nn.Module, names: Collection[str]) -> Iterator[None]:
    """Let some parameters require a gradient that have been frozen, as by `model.freeze()`."""
    frozen = [
        parameter
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if not parameter.requires_grad and clean_name(name) in names
    ]
    for parameter in frozen:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)


@contextmanager
def _preserved_parameters(model: nn.Module) -> Iterator[None]:
    """Undo changes in place: a training step may move an average of the weights."""
    # Changes through `.data` do not show in `_version`, so the numbers are compared.
    copies = [(p, p.data, p.detach().clone()) for p in model.parameters()]
    try:
        yield
    finally:
        for parameter, data, saved in copies:
            if parameter.data_ptr() != data.data_ptr():
                parameter.data = data
            if not torch.equal(parameter, saved):
                with torch.no_grad():
                    parameter.copy_(saved)


@contextmanager
def preserved_metrics(model: nn.Module) -> Iterator[None]:
    """Let the model's metrics update copies of their states, and restore the states afterwards."""
    # `training_step` may update a torchmetrics.Metric, which is recognised by `metric_state`.
    metrics = [module for module in model.modules() if hasattr(module, "metric_state")]
    states = [_metric_state(metric) for metric in metrics]
    _set_states(metrics, [{k: _copy_of(v) for k, v in state.items()} for state in states])
    try:
        yield
    finally:
        _set_states(metrics, states)


def _metric_state(metric: Any) -> dict[str, Any]:
    names = (*metric.metric_state, "_update_count", "_computed", "_forward_cache")
    return {name: getattr(metric, name, None) for name in names}


def _copy_of(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else copy.copy(value)


def _set_states(metrics: Sequence[Any], states: Sequence[Mapping[str, Any]]) -> None:
    for metric, state in zip(metrics, states, strict=True):
        for name, value in state.items():
            setattr(metric, name, value)


@contextmanager
def _trainer_in_training(model: nn.Module) -> Iterator[None]:
    """Let the model's trainer report that it trains; a step may return no loss otherwise."""
    trainer: Any = getattr(model, "_trainer", None)
    if not hasattr(getattr(trainer, "state", None), "stage"):
        yield
        return
    stage, trainer.training = trainer.state.stage, True
    try:
        yield
    finally:
        trainer.state.stage = stage
