"""Compiled models: their graph is one opaque node, so recorded batches run uncompiled."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import nn

# The open contexts. Those of several recorders do not end in reverse order, so the first one
# switches compilation off, and the last one on again.
_open: set[object] = set()
_switched_off = ExitStack()


@contextmanager
def uncompiled() -> Iterator[None]:
    """Run compiled code as ordinary PyTorch inside the context; contexts may end in any order.

    Raises:
        ValueError: If this version of torch cannot do that.
    """
    if not hasattr(torch.compiler, "set_stance"):  # Until torch 2.5.
        raise ValueError(
            "A compiled model can be recorded from torch 2.6 on, which can switch compilation off "
            f"for recorded steps; this is torch {torch.__version__}. Update torch, or train "
            "without `torch.compile`."
        )
    token = object()
    try:
        if not _open:
            _switched_off.enter_context(torch.compiler.set_stance("force_eager"))
        _open.add(token)
        yield
    finally:
        _open.discard(token)
        if not _open:
            _switched_off.close()


def is_compiled(model: nn.Module) -> bool:
    """Return whether a model or a part of it is compiled."""
    is_wrapped = any("_orig_mod" in name for name, _ in model.named_modules())
    return is_wrapped or any(m._compiled_call_impl is not None for m in model.modules())
