"""LayerOutput: one output tensor of a hooked layer until its gradient arrives, and its checks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tda_lightning.gradients.layers import LayerCall, find_tensors


@dataclass(frozen=True)
class LayerOutput:
    """One tensor in the output of a layer, with the call that returned it.

    Attributes:
        module: The layer.
        args: Positional arguments of the call.
        kwargs: Keyword arguments of the call.
        versions: Versions of the tensors among the arguments, which in-place changes raise.
        place: Number of the tensor among the output's tensors.
        axis: Axis of the samples.
        autocast: Context that restores the autocast setting of the call.
        random_state: State of the random number generator before the call, if it is needed.
    """

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    versions: list[int]
    place: int
    axis: int
    autocast: AbstractContextManager[Any]
    random_state: Tensor | None

    def inputs(self) -> list[Tensor]:
        """Return the tensors among the arguments of the call."""
        return [*find_tensors(self.args), *find_tensors(self.kwargs)]

    def call(self, names: tuple[str, ...], grad: Tensor) -> LayerCall:
        """Return the call with the gradient of this output.

        Args:
            names: The layer's parameters to compute factors for.
            grad: Gradient of the loss with respect to this tensor.
        """
        return LayerCall(
            self.module,
            self.args,
            self.kwargs,
            names,
            self.place,
            grad,
            self.axis,
            self.random_state,
        )


def current_autocast(output: Any) -> AbstractContextManager[Any]:
    """Return a context that restores the current autocast setting for the device of ``output``.

    Backward passes run without autocast, and rules may call layers in them.
    """
    device = next(find_tensors(output)).device.type
    if not torch.is_autocast_enabled(device):
        return nullcontext()
    return torch.autocast(device, torch.get_autocast_dtype(device))


_ONE_ITEM = (
    " If each item of the dataset is a batch, pass `sample_ids=` to identify the samples in it."
)


def require_batch(
    name: str, module: nn.Module, inputs: Sequence[Tensor], output: Tensor, axis: int, n: int
) -> None:
    """Check that a layer returned the ``n`` samples of the batch along ``axis``.

    Raises:
        ValueError: If it did not, or if its first input has no axis of samples.
    """
    is_unbatched = bool(inputs) and inputs[0].is_floating_point() and inputs[0].ndim < 2
    if is_unbatched or output.ndim <= axis or output.shape[axis] != n:
        raise ValueError(
            f"The {type(module).__name__} `{name}` returned a tensor of shape "
            f"{tuple(output.shape)} in a batch of {n} samples; expected the samples along axis "
            f"{axis}. Pass `batch_dims={{'{name}': ...}}` (the axis of the samples, or "
            "'flattened' if it is joined with others), or leave the layer out with `layers=[...]`."
            f"{_ONE_ITEM if n == 1 else ''}"
        )


def require_multiple(name: str, module: nn.Module, output: Tensor, n: int) -> None:
    """Check that the rows of a flattened output divide evenly among the samples.

    Raises:
        ValueError: If their number is no multiple of ``n``.
    """
    if output.ndim == 0 or len(output) % n:
        raise ValueError(
            f"The {type(module).__name__} `{name}` returned a tensor of shape "
            f"{tuple(output.shape)} in a batch of {n} samples; expected the same number of rows "
            f"for each sample, because of `batch_dims={{'{name}': 'flattened'}}`. Correct that "
            "entry, or leave the layer out with `layers=[...]`."
        )


def require_unchanged(
    name: str, module: nn.Module, inputs: Sequence[Tensor], versions: Sequence[int]
) -> None:
    """Check that a layer's inputs have not been changed in place since its call.

    Raises:
        ValueError: If one of them has another version than at the call.
    """
    if [x._version for x in inputs] != list(versions):
        raise ValueError(
            f"The input of the {type(module).__name__} `{name}` was changed in place after "
            "the layer's call; expected it unchanged until the backward pass. Use an "
            "out-of-place operation, or leave the layer out with `layers=[...]`."
        )
