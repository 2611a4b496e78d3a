"""Recorded batches run as ordinary PyTorch: uncompiled, and without reentrant checkpoints.

The graph of a compiled model is one opaque node. The graph of a reentrant checkpoint exists only
during the backward pass, which can run only once. In recorded batches, compilation pauses, and
reentrant checkpoints become others, which compute the same numbers in the same memory.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointFunction, checkpoint, set_checkpoint_early_stop


class _OverlappingContexts:
    """Contexts of several recorders, which may end in any order: the first enters, the last exits.

    Args:
        make: Returns the context to be entered.
    """

    def __init__(self, make: Callable[[], AbstractContextManager[Any]]) -> None:
        self._make = make
        self._open: set[object] = set()
        self._entered = ExitStack()
        self._lock = threading.Lock()

    @contextmanager
    def entered(self) -> Iterator[None]:
        token = object()
        try:
            with self._lock:
                if not self._open:
                    self._entered.enter_context(self._make())
                self._open.add(token)
            yield
        finally:
            with self._lock:
                self._open.discard(token)
                if not self._open:
                    self._entered.close()


@contextmanager
def run_plainly(is_compiled: bool) -> Iterator[None]:
    """Run a model as ordinary PyTorch inside the context; contexts may end in any order.

    Raises:
        ValueError: If the model is compiled, and this version of torch cannot run it otherwise.
    """
    with ExitStack() as contexts:
        contexts.enter_context(_WITHOUT_REENTRANCE.entered())
        if is_compiled:
            contexts.enter_context(_UNCOMPILED.entered())
        yield


def is_compiled(model: nn.Module) -> bool:
    """Return whether a model or a part of it is compiled."""
    is_wrapped = any("_orig_mod" in name for name, _ in model.named_modules())
    return is_wrapped or any(m._compiled_call_impl is not None for m in model.modules())


def _uncompiled() -> AbstractContextManager[Any]:
    if not hasattr(torch.compiler, "set_stance"):  # Until torch 2.5.
        raise ValueError(
            "A compiled model can be recorded from torch 2.6 on, which can switch compilation off "
            f"for recorded steps; this is torch {torch.__version__}. Update torch, or train "
            "without `torch.compile`."
        )
    stance: AbstractContextManager[Any] = torch.compiler.set_stance("force_eager")
    return stance


def _is_differentiable(value: Any) -> bool:
    return isinstance(value, Tensor) and value.requires_grad


def _as_leaf(value: Tensor) -> Tensor:
    """Return a view whose gradient is summed and laid out as that of a leaf, and rounds as it does.

    A reentrant checkpoint makes leaves of its inputs.
    """
    strides = torch.empty_like(value, device="meta").stride()

    def laid_out(grad: Tensor) -> Tensor:
        if grad.stride() == strides:
            return grad
        return grad.new_empty_strided(grad.shape, strides).copy_(grad)

    view = value.view_as(value)
    view.register_hook(laid_out)  # type: ignore[no-untyped-call]
    return view


class _WithoutReentrance:
    """Stands in for the function behind reentrant checkpoints."""

    @staticmethod
    def apply(function: Callable[..., Any], preserve_rng_state: bool, *args: Any) -> Any:
        """Run a function under a checkpoint that is not reentrant."""
        if not (torch.is_grad_enabled() and any(map(_is_differentiable, args))):
            # Its parameters get no gradient, and this must not change.
            return CheckpointFunction.apply(  # type: ignore[no-untyped-call]
                function, preserve_rng_state, *args
            )
        inputs = [_as_leaf(each) if _is_differentiable(each) else each for each in args]
        with set_checkpoint_early_stop(False):  # Modules run twice, to the end.
            return checkpoint(
                function,
                *inputs,
                use_reentrant=False,
                preserve_rng_state=preserve_rng_state,
                determinism_check="none",
            )


@contextmanager
def _without_reentrance() -> Iterator[None]:
    vars(torch.utils.checkpoint)["CheckpointFunction"] = _WithoutReentrance
    try:
        yield
    finally:
        vars(torch.utils.checkpoint)["CheckpointFunction"] = CheckpointFunction


_UNCOMPILED = _OverlappingContexts(_uncompiled)
_WITHOUT_REENTRANCE = _OverlappingContexts(_without_reentrance)
