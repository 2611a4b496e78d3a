"""Compiled code: made anew when hooks come or go, and such that its graph can be passed twice."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch._functorch.config as functorch_config
from torch import nn

# The user's setting, and that of every recorder that is on beside others.
_settings: list[bool] = []


@contextmanager
def recordable(model: nn.Module) -> Iterator[None]:
    """Inside, let compiled models run code that was made with hooks in place.

    Code that reuses the memory of a graph refuses a second pass through it, which an adaptive
    optimizer's coordinates and sampled labels need. Inside, none is made.
    """
    if not _is_compiled(model):
        yield
        return
    with _keeping_graphs():
        torch.compiler.reset()  # Code that is there does not look for hooks again.
        try:
            yield
        finally:
            torch.compiler.reset()


@contextmanager
def _keeping_graphs() -> Iterator[None]:
    if not hasattr(functorch_config, "donated_buffer"):  # Until torch 2.5.
        yield
        return
    _settings.append(functorch_config.donated_buffer)
    functorch_config.donated_buffer = False
    try:
        yield
    finally:
        # Recorders may stop in any order: the last one puts the user's setting back.
        functorch_config.donated_buffer = _settings.pop()


def _is_compiled(model: nn.Module) -> bool:
    is_wrapped = any("_orig_mod" in name for name, _ in model.named_modules())
    return is_wrapped or any(one._compiled_call_impl is not None for one in model.modules())
