"""Outputs: what a module's ``forward`` makes of a batch, and the labels beside the inputs."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tda_lightning.stores.arguments import describe

# From a module and a batch to logits or other outputs, and from a batch to its labels.
Outputs = Callable[[nn.Module, Any], Tensor]
Labels = Callable[[Any], Tensor]

_INPUTS = ("x", "input", "inputs", "image", "images", "input_ids", "pixel_values", "features")
_LABELS = ("y", "label", "labels", "target", "targets")


def outputs_of(module: nn.Module, batch: Any) -> Tensor:
    """Return the logits of the module's ``forward`` on a batch's inputs.

    Inputs are the batch if it is a tensor, or its first element if it is a sequence. In a mapping,
    they are found under the name of the first argument of ``forward``, or under a common key, such
    as ``"x"`` or ``"input_ids"``; what else ``forward`` takes by name, such as ``attention_mask``,
    is passed too, except labels. A ``forward`` of keyword arguments only gets all of the mapping
    but the labels. A named tuple is a mapping if its fields have such names, and a dataclass
    if they have the names of arguments of ``forward``.

    Raises:
        ValueError: If there is no ``forward`` that takes the inputs, or the batch has none.
        TypeError: If ``forward`` returns neither a tensor nor an object with ``logits``.
    """
    inputs, others = _arguments_of(module, batch)
    try:
        result = module(*inputs, **others)
    except NotImplementedError as error:
        if "forward" not in str(error):  # An operation inside `forward` is not implemented.
            raise
        raise ValueError(
            f"`{type(module).__name__}` has no `forward`; expected one that turns a batch's inputs "
            "into logits. Define it, or pass a function: "
            "`outputs=lambda module, batch: module.net(batch[0])`."
        ) from error
    except torch.cuda.OutOfMemoryError:
        raise
    except (TypeError, LookupError, AttributeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"`{type(module).__name__}.forward` failed on the batch's inputs, "
            f"{describe([*inputs, *others.values()])}: "
            f"{type(error).__name__}: {error}. If it takes other arguments, pass a function: "
            "`outputs=lambda module, batch: module(batch)`, or `batch[1]` if ids come first."
        ) from error
    logits = getattr(result, "logits", result)
    if not isinstance(logits, Tensor):
        raise TypeError(
            f"`{type(module).__name__}.forward` returned {describe(result)}; expected a tensor, or "
            "an object with `logits`. Pass `outputs=`, a function of (module, batch)."
        )
    return logits


def _arguments_of(module: nn.Module, batch: Any) -> tuple[list[Any], dict[str, Any]]:
    """Return the positional and the keyword arguments for ``forward``."""
    names = tuple(inspect.signature(module.forward).parameters)
    # `forward` may take a dataclass as it is.
    batch = _fields_of(batch, names if dataclasses.is_dataclass(batch) else (*_INPUTS, *names))
    if not isinstance(batch, Mapping):
        is_sequence = isinstance(batch, list | tuple) and len(batch) > 0
        return [batch[0] if is_sequence else batch], {}
    parameters = dict(inspect.signature(module.forward).parameters)
    kinds = [parameter.kind for parameter in parameters.values()]
    if kinds == [inspect.Parameter.VAR_KEYWORD]:
        return [], {name: value for name, value in batch.items() if name not in _LABELS}
    if _by_name(batch, dict(list(parameters.items())[:1])):
        return [], _by_name(batch, parameters)
    inputs = _look_up(batch, _INPUTS, "inputs", "outputs=")
    if not any(batch.get(name) is inputs for name in parameters):  # It has another name there.
        parameters = dict(list(parameters.items())[1:])
        return [inputs], _by_name(batch, parameters)
    return [], _by_name(batch, parameters)


def _fields_of(batch: Any, names: tuple[str, ...]) -> Any:
    """Return a named tuple as a mapping, if a field has such a name or labels come first.

    So is a dataclass, if a field has such a name.
    """
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type | Mapping):
        values = {field.name: getattr(batch, field.name) for field in dataclasses.fields(batch)}
        return values if any(name in names for name in values) else batch
    fields = getattr(batch, "_fields", ())
    is_named = any(field in names for field in fields) or any(f in _LABELS for f in fields[:1])
    return batch._asdict() if is_named else batch


def _by_name(batch: Mapping[str, Any], parameters: Mapping[str, Any]) -> dict[str, Any]:
    return {n: value for n, value in batch.items() if n in parameters and n not in _LABELS}


def labels_of(batch: Any) -> Tensor:
    """Return the second element of a sequence, or a mapping's ``"y"`` or ``"labels"``.

    A named tuple or a dataclass is a mapping if a field has such a name.

    Raises:
        ValueError: If the batch has no labels.
    """
    batch = _fields_of(batch, _LABELS)
    if isinstance(batch, Mapping):
        labels: Tensor = _look_up(batch, _LABELS, "labels", "labels=")
        return labels
    if isinstance(batch, list | tuple) and len(batch) > 1 and isinstance(batch[1], Tensor):
        return batch[1]
    raise ValueError(
        f"There are no labels in {describe(batch)}; expected them as second element. Pass "
        "`labels=`, a function of the batch."
    )


def _look_up(batch: Mapping[str, Any], names: tuple[str, ...], kind: str, argument: str) -> Any:
    for name in names:
        if name in batch:
            return batch[name]
    raise ValueError(
        f"There are no {kind} in a batch with the keys {list(batch)}; expected one of "
        f"{list(names)}. Pass `{argument}`, a function that takes them from the batch."
    )
