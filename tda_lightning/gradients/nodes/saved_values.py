"""Saved values: what a node keeps from the forward pass, read without consuming it.

A non-reentrant checkpoint recomputes its part of the forward pass when the first tensor that it
saved is read, and lets each tensor be read only once. The node itself still has to read it, so
whatever is read here is put back. That needs the hook of the checkpoint, which torch shows since
2.10.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor

_SHOWS_HOOKS = hasattr(torch._C._autograd.SavedTensor, "unpack_hook")


def saved_value(node: Any, name: str) -> Any:
    """Return a value that a node saved.

    Raises:
        ValueError: If a checkpoint saved it, and this version of torch does not show hooks.
    """
    raw: Any = getattr(node, f"_raw_saved_{name}", None)
    value = getattr(node, f"_saved_{name}")
    if raw is not None and not _SHOWS_HOOKS:
        _require_second_reading(node, name)
    pairs = [(raw, value)]
    if isinstance(raw, list | tuple):
        pairs = [*zip(raw, value, strict=True)]
    for each, content in pairs:
        if _is_recomputed(each):
            _put_back(each, content)
    return value


def what_reopens(node: Any) -> Callable[[], None]:
    """Return a function that lets a node read its checkpointed tensors once more."""
    values = [(raw, raw.unpack_hook(raw.data)) for raw in _raw_values(node) if _is_recomputed(raw)]

    def reopen() -> None:
        for raw, value in values:
            _put_back(raw, value)

    reopen()
    return reopen


def is_checkpointed(node: Any) -> bool:
    """Return whether a checkpoint recomputes what a node saved."""
    return any(map(_is_recomputed, _raw_values(node)))


def _raw_values(node: Any) -> Iterator[Any]:
    """Yield what a node saved, as it saved it."""
    kind: Any = type(node)
    for name in _raw_names(kind):
        raw = getattr(node, name)
        yield from raw if isinstance(raw, list | tuple) else [raw]


@cache
def _raw_names(kind: Hashable) -> list[str]:
    return [name for name in dir(kind) if name.startswith("_raw_saved_")]


def _is_recomputed(raw: Any) -> bool:
    return getattr(raw, "unpack_hook", None) is not None and hasattr(raw.data, "handles")


def saved_without_hook(node: Any, name: str) -> Tensor | None:
    """Return a tensor that a node saved, or ``None`` if a hook unpacks it."""
    if _SHOWS_HOOKS and getattr(node, f"_raw_saved_{name}").unpack_hook is not None:
        return None
    value: Tensor = getattr(node, f"_saved_{name}")
    if not _SHOWS_HOOKS:
        _require_second_reading(node, name)
    return value


def _require_second_reading(node: Any, name: str) -> None:
    from torch.utils.checkpoint import CheckpointError

    try:
        getattr(node, f"_saved_{name}")
    except CheckpointError as error:
        raise ValueError(
            "A model with activation checkpoints can be recorded from torch 2.10 on, where the "
            "tensors of a checkpoint can be read twice; this is torch "
            f"{torch.__version__}. Update torch, or train without checkpoints."
        ) from error


def _put_back(raw: Any, value: Any) -> None:
    """Let a checkpointed tensor be read once more."""
    import torch.utils.checkpoint as checkpoint

    frame = _frame_of(raw.unpack_hook)
    group = torch._C._current_graph_task_id()
    handle = checkpoint._Handle()
    raw.data.handles[group] = handle
    frame.recomputed[group][handle] = value


def _frame_of(unpack_hook: Any) -> Any:
    """Return the checkpoint that a saved tensor belongs to, from the closure of its hook."""
    for cell in unpack_hook.__closure__ or ():
        content = cell.cell_contents
        if hasattr(content, "recomputed"):
            return content
        if callable(content) and getattr(content, "__closure__", None):
            frame = _frame_of(content)
            if frame is not None:
                return frame
    return None
