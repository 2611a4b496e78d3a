"""Read what a node saved in the forward pass, also under activation checkpointing.

A non-reentrant checkpoint recomputes its part of the forward pass when the first saved tensor is
read, and lets each tensor be read only once. The node itself still has to read it, so a reading
puts the tensor back.
"""

from __future__ import annotations

from typing import Any

import torch


def saved_value(node: Any, name: str) -> Any:
    """Return a value that a node saved, without consuming it."""
    raw = getattr(node, f"_raw_saved_{name}", None)
    unpack_hook = getattr(raw, "unpack_hook", None)
    value = getattr(node, f"_saved_{name}")
    if raw is not None and unpack_hook is not None and hasattr(raw.data, "handles"):
        _put_back(unpack_hook, raw.data, value)
    return value


def _put_back(unpack_hook: Any, holder: Any, value: Any) -> None:
    """Let a checkpointed tensor be read once more."""
    import torch.utils.checkpoint as checkpoint

    frame = _frame_of(unpack_hook)
    group = torch._C._current_graph_task_id()
    handle = checkpoint._Handle()
    holder.handles[group] = handle
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
