"""An emulated device: it computes on the CPU, and refuses operations that mix it with the CPU.

``torch.device("elsewhere")`` behaves as an accelerator. Tensors must be moved there, factory
functions need ``device=``, and its tensors cannot become NumPy arrays. It refuses the mixtures of
devices that CUDA refuses. Its results equal those of the CPU to the bit.
"""

from __future__ import annotations

from collections.abc import Collection
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils import backend_registration

from tda_lightning.stores.precision import DEVICES_WITHOUT_DOUBLE

# Their default implementations would create an empty tensor first, and then resize it.
_FACTORIES = ("eye", "eye.m", "arange", "arange.start", "arange.start_step", "randperm")
_COPIES = {"copy_", "_to_copy"}
_INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_"}
# Operations for which a program waits, since their results, or the sizes of these, are needed.
_WAITING = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero"}
_WAITING |= {"_unique2", "unique_dim", "unique_consecutive"}
# What Apple's GPUs refuse: a number format, and operations.
APPLE = {torch.float64, "_linalg_eigh", "linalg_eigvalsh", "cholesky_solve", "cholesky_inverse"}
_refused: set[Any] = set()
# While it is a list: the copies between the device and the CPU, and the operations that wait.
transfers: list[str] | None = None


class Elsewhere(Tensor):
    """A tensor on the device."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> Elsewhere:
        assert not isinstance(inner, Elsewhere)
        if inner.dtype in _refused:
            raise TypeError(f"this device does not support {inner.dtype}")
        tensor = torch.Tensor._make_wrapper_subclass(
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            layout=inner.layout,
            device="elsewhere:0",
        )
        tensor.inner = inner
        return tensor

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _compute(func, *args, **(kwargs or {}))

    def __repr__(self) -> str:
        return f"Elsewhere({self.inner!r})"


def _compute(func: Any, *args: Any, **kwargs: Any) -> Any:
    """Compute on the CPU; results are on the operands' device, or on ``device`` if it is given."""
    name = func._schema.name.split("::")[1]
    if transfers is not None:
        transfers.extend(_transfer(name, args, kwargs))
    # Like CUDA, it accepts indices on the CPU.
    indices = args[1] if name in _INDEXING and isinstance(args[0], Elsewhere) else []
    leaves = pytree.tree_leaves((args, kwargs))
    here = [x for x in leaves if _is_here(x) and not any(x is index for index in indices)]
    there = [x for x in leaves if isinstance(x, Elsewhere)]
    if here and there and name not in _COPIES:
        raise RuntimeError(f"Expected all tensors to be on the same device: {func}")
    if there and name in _refused:
        raise NotImplementedError(f"{func} is not implemented for this device")
    requested = kwargs.get("device")
    if requested is not None:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    goes_there = there if requested is None else torch.device(requested).type == "elsewhere"
    if name == "copy_":
        goes_there = isinstance(args[0], Elsewhere)
    result = func(*pytree.tree_map(_inner, args), **pytree.tree_map(_inner, kwargs))
    originals = {id(x.inner): x for x in there}

    def outer(leaf: Any) -> Any:
        if id(leaf) in originals:
            return originals[id(leaf)]
        return Elsewhere(leaf) if isinstance(leaf, Tensor) and goes_there else leaf

    return pytree.tree_map(outer, result)


def _transfer(name: str, args: Any, kwargs: Any) -> list[str]:
    """Describe an operation that copies to or from the device, or that waits for it."""
    if name in _WAITING:
        return [f"wait for {name}"]
    if name in _INDEXING and any(x.dtype == torch.bool for x in args[1] if x is not None):
        return ["wait for the size of a selection"]
    if name not in _COPIES:
        return []
    source, is_blocking = args[0], not kwargs.get("non_blocking", False)
    goes_there = torch.device(kwargs.get("device") or source.device).type == "elsewhere"
    if name == "copy_":
        source, goes_there = args[1], isinstance(args[0], Elsewhere)
        is_blocking = not (kwargs.get("non_blocking", False) or args[2:] == (True,))
    if goes_there == isinstance(source, Elsewhere):
        return []
    words = ("to" if goes_there else "from", "waited for" if is_blocking else "in the background")
    return ["copy {} the device, {}".format(*words)]


def _is_here(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and not isinstance(leaf, Elsewhere) and leaf.ndim > 0


def _inner(leaf: Any) -> Any:
    return leaf.inner if isinstance(leaf, Elsewhere) else leaf


class Generator(torch.Generator):
    """The CPU's generator for any device: devices that are written in Python have none."""

    def __new__(cls, device: Any = "cpu") -> Generator:
        return super().__new__(cls, "cpu")


def install(refusing: Collection[Any] = ()) -> list[torch.library.Library]:
    """Register the device in this process; it works as long as the returned libraries are alive.

    Args:
        refusing: Number formats and names of operations that it refuses.
    """
    _refused.update(refusing)
    if torch.float64 in _refused:
        DEVICES_WITHOUT_DOUBLE.add("elsewhere")
    backend_registration._setup_privateuseone_for_python_backend("elsewhere")
    fallback = torch.library.Library("_", "IMPL")
    fallback.fallback(_compute, "PrivateUse1")
    factories = torch.library.Library("aten", "IMPL")
    for name in _FACTORIES:
        packet, _, overload = name.partition(".")
        operator = getattr(getattr(torch.ops.aten, packet), overload or "default")
        factories.impl(name, partial(_compute, operator), "PrivateUse1")
    original = torch.tensor

    def tensor(data: Any, *, device: Any = None, **rest: Any) -> Tensor:
        # `torch.tensor` does not dispatch to devices that are written in Python.
        result = original(data, **rest)
        return result if device is None else result.to(device)

    torch.tensor, torch.Generator = tensor, Generator  # type: ignore[misc]
    return [fallback, factories]
