"""A device that this machine does not have: its tensors are the CPU's, and may not meet the CPU's.

``torch.device("elsewhere")`` is a device in every way that matters to code that is written for one:
tensors must be put there, factories must be told, and what is there cannot become an array. Where
tensors of two devices meet that CUDA would refuse, so does this one. What it computes is what the
CPU computes, to the bit.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils import backend_registration

# These would make something empty first, and then resize it.
_FACTORIES = ("eye", "eye.m", "arange", "arange.start", "arange.start_step", "randperm")
_COPIES = {"copy_", "_to_copy"}
_INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_"}


class Elsewhere(Tensor):
    """A tensor on the device."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> Elsewhere:
        assert not isinstance(inner, Elsewhere)
        found = torch.Tensor._make_wrapper_subclass(
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            layout=inner.layout,
            device="elsewhere:0",
        )
        found.inner = inner
        return found

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _compute(func, *args, **(kwargs or {}))

    def __repr__(self) -> str:
        return f"Elsewhere({self.inner!r})"


def _compute(func: Any, *args: Any, **kwargs: Any) -> Any:
    """Compute on the CPU; results are where the operands are, or where they are wanted."""
    name = func._schema.name.split("::")[1]
    # As CUDA does, it takes indices that lie on the CPU.
    indices = args[1] if name in _INDEXING and isinstance(args[0], Elsewhere) else []
    leaves = pytree.tree_leaves((args, kwargs))
    here = [one for one in leaves if _is_here(one) and not any(one is i for i in indices)]
    there = [one for one in leaves if isinstance(one, Elsewhere)]
    if here and there and name not in _COPIES:
        raise RuntimeError(f"Expected all tensors to be on the same device: {func}")
    wanted = kwargs.get("device")
    if wanted is not None:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    goes_there = there if wanted is None else torch.device(wanted).type == "elsewhere"
    if name == "copy_":
        goes_there = isinstance(args[0], Elsewhere)
    found = func(*pytree.tree_map(_inner, args), **pytree.tree_map(_inner, kwargs))
    originals = {id(one.inner): one for one in there}

    def outer(one: Any) -> Any:
        if id(one) in originals:
            return originals[id(one)]
        return Elsewhere(one) if isinstance(one, Tensor) and goes_there else one

    return pytree.tree_map(outer, found)


def _is_here(one: Any) -> bool:
    return isinstance(one, Tensor) and not isinstance(one, Elsewhere) and one.ndim > 0


def _inner(one: Any) -> Any:
    return one.inner if isinstance(one, Elsewhere) else one


class Generator(torch.Generator):
    """The CPU's, for any device: one of Python's has none of its own."""

    def __new__(cls, device: Any = "cpu") -> Generator:
        return super().__new__(cls, "cpu")


def install() -> list[torch.library.Library]:
    """Let this process have the device, for as long as it keeps what is returned."""
    backend_registration._setup_privateuseone_for_python_backend("elsewhere")
    anything = torch.library.Library("_", "IMPL")
    anything.fallback(_compute, "PrivateUse1")
    factories = torch.library.Library("aten", "IMPL")
    for name in _FACTORIES:
        packet, _, overload = name.partition(".")
        operator = getattr(getattr(torch.ops.aten, packet), overload or "default")
        factories.impl(name, partial(_compute, operator), "PrivateUse1")
    original = torch.tensor

    def tensor(data: Any, *, device: Any = None, **rest: Any) -> Tensor:
        # What it does itself does not ask a device of Python's.
        made = original(data, **rest)
        return made if device is None else made.to(device)

    torch.tensor, torch.Generator = tensor, Generator  # type: ignore[misc]
    return [anything, factories]
