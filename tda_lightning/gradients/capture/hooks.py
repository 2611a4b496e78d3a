"""Hooks: tensor hooks that survive in-place changes, and compiled models."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
import torch._functorch.config as functorch_config
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge


def hook_gradient(
    tensor: Tensor, inputs: Sequence[Tensor], deliver: Callable[[Tensor], None], name: str
) -> GradientEdge:
    """Call ``deliver`` with the gradient of the current value of ``tensor``.

    In-place changes of a view drop the hooks on it, but not the hooks on its base. So if a layer
    returns a view of a tensor that it has created, the hook goes on the base.

    Returns:
        The edge of the hooked tensor in the autograd graph.
    """
    base = tensor._base
    is_created = base is not None and not any(x is base or x._base is base for x in inputs)
    if base is None or not is_created or not base.is_contiguous() or base.numel() != tensor.numel():
        return _register(tensor, lambda grad: deliver(grad.detach()))
    size, stride, offset = tensor.size(), tensor.stride(), tensor.storage_offset()

    def deliver_view(grad: Tensor) -> None:
        deliver(grad.detach().contiguous().as_strided(size, stride, offset))

    return _register(base, deliver_view)


def _register(tensor: Tensor, hook: Callable[[Tensor], None]) -> GradientEdge:
    tensor.register_hook(hook)  # type: ignore[no-untyped-call]
    return get_gradient_edge(tensor)


# A stack of the settings that active recorders found; the user's is at the bottom.
_donated_buffer_settings: list[bool] = []


@contextmanager
def recordable(model: nn.Module) -> Iterator[None]:
    """Run a compiled model with code that was compiled while the hooks are attached.

    Compiled code may reuse the memory of a graph, and then refuses a second pass through it. An
    adaptive optimizer's coordinates and sampled labels need that pass, so the reuse is switched off
    inside the context.
    """
    if not _is_compiled(model):
        yield
        return
    with _without_donated_buffers():
        torch.compiler.reset()  # Existing code does not check for new hooks.
        try:
            yield
        finally:
            torch.compiler.reset()


@contextmanager
def _without_donated_buffers() -> Iterator[None]:
    if not hasattr(functorch_config, "donated_buffer"):  # Until torch 2.5.
        yield
        return
    _donated_buffer_settings.append(functorch_config.donated_buffer)
    functorch_config.donated_buffer = False
    try:
        yield
    finally:
        # Recorders may stop in any order: the last one restores the user's setting.
        functorch_config.donated_buffer = _donated_buffer_settings.pop()


def _is_compiled(model: nn.Module) -> bool:
    is_wrapped = any("_orig_mod" in name for name, _ in model.named_modules())
    return is_wrapped or any(m._compiled_call_impl is not None for m in model.modules())
