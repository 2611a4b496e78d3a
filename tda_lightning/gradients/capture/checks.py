"""What a layer must show to be recorded: refused otherwise, with the remedy."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

_ONE_ITEM = " If each item of the dataset is a batch, name its samples: pass `sample_ids=`."


def require_batch(
    name: str, module: nn.Module, inputs: Sequence[Tensor], output: Tensor, axis: int, n: int
) -> None:
    """Raise unless a layer returned the samples of the batch along their axis."""
    is_unbatched = bool(inputs) and inputs[0].is_floating_point() and inputs[0].ndim < 2
    if is_unbatched or output.ndim <= axis or output.shape[axis] != n:
        raise ValueError(
            f"The {type(module).__name__} `{name}` returned a tensor of shape "
            f"{tuple(output.shape)} in a batch of {n} samples; expected the samples along axis "
            f"{axis}. Say where they are with `batch_dims={{'{name}': ...}}` (an axis, or "
            "'flattened' if it is joined with others), or leave the layer out with `layers=[...]`."
            f"{_ONE_ITEM if n == 1 else ''}"
        )


def require_multiple(name: str, module: nn.Module, output: Tensor, n: int) -> None:
    """Raise unless a layer returned as many rows for each sample of the batch."""
    if output.ndim == 0 or len(output) % n:
        raise ValueError(
            f"The {type(module).__name__} `{name}` returned a tensor of shape "
            f"{tuple(output.shape)} in a batch of {n} samples; expected as many rows for each, "
            f"since `batch_dims={{'{name}': 'flattened'}}` says so. Correct it, or leave the layer "
            "out with `layers=[...]`."
        )


def require_unchanged(
    name: str, module: nn.Module, inputs: Sequence[Tensor], versions: Sequence[int]
) -> None:
    """Raise if what a layer was called with has been changed since."""
    if [x._version for x in inputs] != list(versions):
        raise ValueError(
            f"The input of the {type(module).__name__} `{name}` was changed in place after "
            "the layer had seen it; expected it unchanged until the backward pass. Use an "
            "operation that is not in place, or leave the layer out with `layers=[...]`."
        )
