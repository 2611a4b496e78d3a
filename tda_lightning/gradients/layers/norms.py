"""Rules for normalization layers and PReLU: scale and shift per channel, stacked in one column.

Batch norm is recorded with the statistics of the batch: a sample's row is its summand in the
gradient of that batch.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm

from tda_lightning.gradients.factors import GradientFactors
from tda_lightning.gradients.layers.rule import LayerCall, as_column, layer_rule, one_column


def _per_channel(values: Tensor) -> Tensor:
    """Sum ``(n, channels, ...)`` over all axes but samples and channels."""
    return values.flatten(2).sum(dim=2) if values.ndim > 2 else values


def _per_feature(values: Tensor, size: int) -> Tensor:
    """Sum ``(n, ..., features)`` to ``(n, size)``: the last axes, of ``size`` entries, remain."""
    return values.reshape(len(values), -1, size).sum(dim=1)


def _times_(values: Tensor, grad: Tensor) -> Tensor:
    """Multiply ``values`` by a gradient: in place if its dtype allows, since allocating is slow."""
    is_wide = torch.result_type(values, grad) == values.dtype
    return values.mul_(grad) if is_wide else values * grad


def _scale_and_shift(call: LayerCall, scale: Tensor, shift: Tensor) -> GradientFactors:
    """Return the factors for the scale and shift of a block, or for one of them."""
    gradients = {"weight": scale, "bias": shift}
    return one_column(torch.cat([gradients[name] for name in call.names], dim=1))


@layer_rule(nn.LayerNorm, layout=as_column)
def _layer_norm(call: LayerCall) -> GradientFactors:
    module, grad, x = call.module, call.grad, call.input
    normalized = functional.layer_norm(x, module.normalized_shape, eps=module.eps)
    size = module.weight.numel()
    return _scale_and_shift(
        call, _per_feature(_times_(normalized, grad), size), _per_feature(grad, size)
    )


@layer_rule(nn.RMSNorm, layout=as_column)
def _rms_norm(call: LayerCall) -> GradientFactors:
    module, x = call.module, call.input
    normalized = functional.rms_norm(x, module.normalized_shape, eps=module.eps)
    return one_column(_per_feature(_times_(normalized, call.grad), module.weight.numel()))


@layer_rule(nn.GroupNorm, layout=as_column)
def _group_norm(call: LayerCall) -> GradientFactors:
    module, grad = call.module, call.grad
    normalized = functional.group_norm(call.input, module.num_groups, eps=module.eps)
    return _scale_and_shift(call, _per_channel(_times_(normalized, grad)), _per_channel(grad))


@layer_rule(nn.BatchNorm1d, layout=as_column)
@layer_rule(nn.BatchNorm2d, layout=as_column)
@layer_rule(nn.BatchNorm3d, layout=as_column)
@layer_rule(nn.InstanceNorm1d, layout=as_column)
@layer_rule(nn.InstanceNorm2d, layout=as_column)
@layer_rule(nn.InstanceNorm3d, layout=as_column)
def _batch_or_instance_norm(call: LayerCall) -> GradientFactors:
    module, grad, x = call.module, call.grad, call.input
    if not module.training and module.running_mean is not None:
        mean, variance = module.running_mean, module.running_var
        normalized = functional.batch_norm(x, mean, variance, eps=module.eps)
    elif isinstance(module, _BatchNorm):
        normalized = functional.batch_norm(x, None, None, training=True, eps=module.eps)
    else:
        normalized = functional.instance_norm(x, eps=module.eps)
    return _scale_and_shift(call, _per_channel(_times_(normalized, grad)), _per_channel(grad))


@layer_rule(nn.PReLU, parameters=("weight",), layout=as_column)
def _prelu(call: LayerCall) -> GradientFactors:
    gradients = _per_channel(_times_(call.input.clamp_max(0), call.grad))
    is_shared = call.module.weight.numel() == 1
    return one_column(gradients.sum(dim=1, keepdim=True) if is_shared else gradients)
