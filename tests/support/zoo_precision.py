"""Make transformers compute in float64 throughout: its norms and softmaxes change to float32.

Their rounding to float32 would hide errors of a row below 1e-7.
"""

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import nn
from torch.overrides import TorchFunctionMode


@contextmanager
def computing_in(dtype: torch.dtype) -> Iterator[None]:
    """Leave out the changes to float32 if ``dtype`` is float64."""
    if dtype != torch.float64:
        yield
        return
    call, is_inside = nn.Module.__call__, False

    # Not one mode around everything: autograd switches modes off while it runs hooks, and hooks
    # may call modules again.
    def call_without_float32(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        nonlocal is_inside
        if is_inside:
            return call(module, *args, **kwargs)
        is_inside = True
        try:
            with WithoutFloat32():
                return call(module, *args, **kwargs)
        finally:
            is_inside = False

    with patch.object(nn.Module, "__call__", call_without_float32):
        yield


class WithoutFloat32(TorchFunctionMode):
    """Replaces float32 by float64 wherever code of transformers names it."""

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = dict(kwargs or {})
        if called_by_transformers():
            function = torch.Tensor.double if function is torch.Tensor.float else function
            args = tuple(torch.float64 if each is torch.float32 else each for each in args)
            kwargs = {k: torch.float64 if v is torch.float32 else v for k, v in kwargs.items()}
        return function(*args, **kwargs)


def called_by_transformers() -> bool:
    """Return whether the innermost caller outside of torch is in transformers."""
    frame = sys._getframe(2)
    while frame is not None and frame.f_globals.get("__name__", "").startswith("torch."):
        frame = frame.f_back
    return frame is not None and frame.f_globals.get("__name__", "").startswith("transformers.")
