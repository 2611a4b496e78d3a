"""Run a user's model and leave no trace: modes, buffers, metrics, logs, random numbers."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

# How a model acts while something passes through it: as in evaluation, or as in training.
Mode = Literal["eval", "train"]


@contextmanager
def preserved_state(model: nn.Module, mode: Mode) -> Iterator[None]:
    """Put the model into ``mode`` with logging muted, and put everything back afterwards.

    Args:
        model: A LightningModule, or any module.
        mode: Whether layers such as dropout and batch norm act as in evaluation or in training.
    """
    with ExitStack() as stack:
        stack.enter_context(preserved_rng(cuda_devices(model)))
        for context in (_same_modes, _same_buffers, same_metrics, _muted):
            stack.enter_context(context(model))
        model.train(mode == "train")
        yield


def cuda_devices(model: nn.Module) -> list[torch.device]:
    """Return the GPUs on which a model has parameters."""
    return list({one.device for one in model.parameters() if one.device.type == "cuda"})


@contextmanager
def swapped_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> Iterator[None]:
    """Give the model other weights and buffers, and its own back afterwards.

    Args:
        model: Any module.
        weights: As its ``state_dict`` has them, on any device.

    Raises:
        ValueError: If they are not those of such a model.
    """
    own = {name: one for name, one in model.state_dict().items() if isinstance(one, Tensor)}
    unlike = [n for n in {*own, *weights} if _shape(own.get(n)) != _shape(weights.get(n))]
    if unlike:
        name = min(unlike)
        raise ValueError(
            f"The weights do not fit the `{type(model).__name__}`: expected `{name}` of shape "
            f"{_shape(own.get(name))}, got {_shape(weights.get(name))}. Pass the model that was "
            "trained."
        )
    copies = {name: one.detach().clone() for name, one in own.items()}
    try:
        _copy(own, weights)
        yield
    finally:
        _copy(own, copies)


def _shape(tensor: Tensor | None) -> tuple[int, ...] | None:
    return None if tensor is None else tuple(tensor.shape)


def _copy(to: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        for name, tensor in to.items():
            tensor.copy_(found[name])


@contextmanager
def preserved_rng(devices: Sequence[torch.device] = ()) -> Iterator[None]:
    """Put the random numbers of torch, NumPy and Python back to where they were.

    Args:
        devices: GPUs whose random numbers to put back as well.
    """
    python, array = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(array)


@contextmanager
def _same_modes(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def _same_buffers(model: nn.Module) -> Iterator[None]:
    copies = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, saved in copies:
                buffer.copy_(saved)


@contextmanager
def same_metrics(model: nn.Module) -> Iterator[None]:
    """Let the model's metrics count on copies, and give them their own numbers back afterwards."""
    # A torchmetrics.Metric, recognised by what it keeps, counts in `training_step`.
    metrics = [one for one in model.modules() if hasattr(one, "metric_state")]
    states = [_metric_state(metric) for metric in metrics]
    _set_states(metrics, [{k: _copied(v) for k, v in state.items()} for state in states])
    try:
        yield
    finally:
        _set_states(metrics, states)


def _metric_state(metric: Any) -> dict[str, Any]:
    names = (*metric.metric_state, "_update_count", "_computed", "_forward_cache")
    return {name: getattr(metric, name, None) for name in names}


def _copied(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else copy.copy(value)


def _set_states(metrics: Sequence[Any], states: Sequence[Mapping[str, Any]]) -> None:
    for metric, state in zip(metrics, states, strict=True):
        for name, value in state.items():
            setattr(metric, name, value)


@contextmanager
def _muted(model: nn.Module) -> Iterator[None]:
    names = ("log", "log_dict")
    own = {name: vars(model)[name] for name in names if name in vars(model)}
    for name in names:
        vars(model)[name] = _say_nothing
    try:
        yield
    finally:
        for name in names:
            del vars(model)[name]
        vars(model).update(own)


def _say_nothing(*args: object, **kwargs: object) -> None:
    return None
