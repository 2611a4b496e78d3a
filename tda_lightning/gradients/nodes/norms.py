"""Rules for normalizations: the gradients of scale and shift, per channel or per feature.

Batch norm is recorded with the statistics of the batch: a sample's row is its summand in the
gradient of that batch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tda_lightning.gradients.nodes.linear import sum_to_shape
from tda_lightning.gradients.nodes.rule import Contribution, NodeCall, first_axis, node_rule


def _times(normalized: Tensor, grad: Tensor) -> Tensor:
    """Multiply, in place if the number format allows: allocating is slow."""
    is_wide = torch.result_type(normalized, grad) == normalized.dtype
    return normalized.mul_(grad) if is_wide else normalized * grad


def _axes_before(output: Sequence[int], parameter: Sequence[int], position: int) -> Sequence[int]:
    return range(len(output) - len(parameter))


def _per_feature(call: NodeCall, values: Tensor) -> Tensor:
    """Sum to ``(n, *shape)``: the last axes remain."""
    first = call.samples_first(values)
    axes = tuple(range(1, first.ndim - len(call.shape)))
    return first.sum(dim=axes) if axes else first


@node_rule("NativeLayerNormBackward0", axes=_axes_before)
def _layer_norm(call: NodeCall) -> Contribution:
    if call.position == 2:
        return _per_feature(call, call.grad)
    normalized = (call.saved("input") - call.saved("result1")).mul_(call.saved("result2"))
    return _per_feature(call, _times(normalized, call.grad))


@node_rule("FusedRmsNormBackward0", axes=_axes_before)
def _rms_norm(call: NodeCall) -> Contribution:
    normalized = call.saved("input") * call.saved("result1")
    return _per_feature(call, _times(normalized, call.grad))


def sum_per_channel(call: NodeCall, values: Tensor) -> Tensor:
    """Sum ``(n * parts, channels, ...)`` to ``(n, channels)``."""
    per_image = values.flatten(2).sum(dim=2) if values.ndim > 2 else values
    first = call.samples_first(per_image).reshape(call.n, -1, values.shape[1])
    return first[:, 0] if first.shape[1] == 1 else first.sum(dim=1)


@node_rule("NativeGroupNormBackward0", axes=first_axis)
def _group_norm(call: NodeCall) -> Contribution:
    if call.position == 2:
        return sum_per_channel(call, call.grad)
    x, groups = call.saved("input"), call.saved("group")
    grouped = x.reshape(x.shape[0], groups, -1)
    mean, scale = (call.saved(name)[..., None] for name in ("result1", "result2"))
    normalized = ((grouped - mean) * scale).reshape(x.shape)
    return sum_per_channel(call, _times(normalized, call.grad))


def _per_channel_axes(
    output: Sequence[int], parameter: Sequence[int], position: int
) -> Sequence[int]:
    # Instance norm joins samples and channels, and repeats its weight for each sample.
    return (0,) if output[0] != 1 or len(output) < 2 else (1,)


@node_rule("NativeBatchNormBackward0", "CudnnBatchNormBackward0", axes=_per_channel_axes)
def _batch_norm(call: NodeCall) -> Contribution:
    x, grad = call.saved("input"), call.grad
    if call.position == 1:
        shape = (1, -1) + (1,) * (x.ndim - 2)
        mean, scale = (values.reshape(shape) for values in batch_norm_statistics(call)[:2])
        grad = _times((x - mean).mul_(scale), grad)
    if call.layout.axis == 0:
        return sum_per_channel(call, grad)
    totals = grad.sum(dim=[0, *range(2, grad.ndim)])
    mask = torch.eye(call.n, dtype=totals.dtype, device=totals.device)
    outer, inner = call.layout.sizes(len(totals), call.n)
    parts = totals.reshape(outer, call.n, inner)
    return sum_to_shape(
        torch.einsum("aib,ij->jaib", parts, mask).reshape(call.n, -1), call.shape, call.n
    )


def batch_norm_statistics(call: NodeCall) -> tuple[Tensor, Tensor, bool]:
    """Return the mean and the inverse deviation in use, and whether they are the batch's."""
    is_training = not hasattr(call.node, "_saved_training") or call.saved("training")
    if is_training:
        return call.saved("result1"), call.saved("result2"), True
    variance = call.saved("running_var") + batch_norm_eps(call)
    return call.saved("running_mean"), variance.rsqrt(), False


def batch_norm_eps(call: NodeCall) -> float:
    """Return what a batch norm adds to the variance."""
    eps: float = call.saved("eps" if hasattr(call.node, "_saved_eps") else "epsilon")
    return eps
