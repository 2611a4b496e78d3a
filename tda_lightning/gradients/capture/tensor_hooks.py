"""Hooks on tensors that survive whatever is done to the tensor afterwards."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge


def hook_gradient(
    tensor: Tensor, inputs: Sequence[Tensor], deliver: Callable[[Tensor], None], name: str
) -> GradientEdge:
    """Call ``deliver`` with the gradient of what ``tensor`` holds now, whatever is done to it.

    A hook on a view is lost when the view is changed in place, one on its base is not; so if a
    layer returns a view of a tensor of its own making, the hook goes there. Returns where it went.
    """
    base = tensor._base
    is_own = base is not None and not any(x is base or x._base is base for x in inputs)
    if base is None or not is_own or not base.is_contiguous() or base.numel() != tensor.numel():
        return _register(tensor, lambda grad: deliver(grad.detach()))
    size, stride, offset = tensor.size(), tensor.stride(), tensor.storage_offset()

    def see_through(grad: Tensor) -> None:
        deliver(grad.detach().contiguous().as_strided(size, stride, offset))

    return _register(base, see_through)


def _register(tensor: Tensor, hook: Callable[[Tensor], None]) -> GradientEdge:
    tensor.register_hook(hook)  # type: ignore[no-untyped-call]
    return get_gradient_edge(tensor)
