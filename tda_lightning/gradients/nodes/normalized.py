"""Weights in front of a batch norm: rows that include the effect through its statistics."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tda_lightning.gradients.factors import (
    BatchStatistics,
    GradientFactors,
    GroupedDense,
    Operand,
    Regrouped,
)
from tda_lightning.gradients.nodes.norms import (
    batch_norm_eps,
    batch_norm_statistics,
    sum_per_channel,
)
from tda_lightning.gradients.nodes.rule import Contribution, NodeCall, rule_for

# Fewer outputs per channel than this have no statistics to speak of: one query through a linear
# layer would be its own mean, and its row zero.
_MIN_OUTPUTS = 8
# Operations whose output a batch norm can have as its input, with the position of the weight, and
# whether the factors of the weight are those of its transpose.
_WEIGHTS = {
    "ConvolutionBackward0": (1, False),
    "AddmmBackward0": (2, True),
    "MmBackward0": (1, True),
}


@dataclass(frozen=True)
class NormBackward:
    """A batch norm in the backward pass.

    Attributes:
        grad: Gradient of the loss with respect to the inputs, at fixed statistics.
        x: The inputs.
        mean: Mean of the inputs over this batch, per channel.
        scale: Inverse of their deviation.
        shifts: Sum of each sample's ``grad``, ``(n, channels)``.
        scales: Sum of its products with the standardized inputs, ``(n, channels)``.
        by_batch: Whether the norm used the statistics of this batch.
    """

    grad: Tensor
    x: Tensor
    mean: Float[Tensor, " channels"]
    scale: Float[Tensor, " channels"]
    shifts: Float[Tensor, "n channels"]
    scales: Float[Tensor, "n channels"]
    by_batch: bool

    @classmethod
    def of(cls, call: NodeCall) -> NormBackward | None:
        """Read a batch norm's node; ``None`` if it does not normalize over the samples."""
        x = call.saved("input")
        mean, scale, by_batch = batch_norm_statistics(call)
        too_few = not by_batch and x.numel() < _MIN_OUTPUTS * x.shape[1]
        if call.layout.axis != 0 or too_few:
            return None
        wide = torch.promote_types(x.dtype, torch.float32)
        x, weight = x.to(wide), call.saved("weight")
        factor = scale if weight is None else scale * weight
        grad = call.grad.to(wide) * factor.reshape(1, -1, *[1] * (x.ndim - 2))
        shifts = sum_per_channel(call, grad)
        scales = scale * (sum_per_channel(call, grad * x) - mean * shifts)
        if not by_batch:
            mean, scale = _own_statistics(x, batch_norm_eps(call))
        return cls(grad, x, mean, scale, shifts, scales, by_batch)


def _own_statistics(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    variance, mean = torch.var_mean(x, dim=[0, *range(2, x.ndim)], correction=0)
    return mean, (variance + eps).rsqrt()


def is_followed(node: Any) -> bool:
    """Return whether a node is an operation whose effect on batch statistics is known."""
    name = type(node).__name__
    is_transposed = name == "ConvolutionBackward0" and node._saved_transposed
    return name in _WEIGHTS and not is_transposed


def has_statistics(call: NodeCall) -> bool:
    """Return whether the input of a followed node is its weight, with the samples first."""
    position, _ = _WEIGHTS[type(call.node).__name__]
    return call.position == position and call.layout.axis == 0


def contribution_in_front_of(norm: NormBackward, call: NodeCall) -> Contribution:
    """Return the gradients of a weight whose output goes into a batch norm and nowhere else."""
    rule, shape = rule_for(call.node).contribution, call.grad.shape
    factors, of_x = (
        rule(replace(call, grads=(values.reshape(shape),))) for values in (norm.grad, norm.x)
    )
    if not isinstance(factors, GradientFactors) or not isinstance(of_x, GradientFactors):
        return rule(call)
    is_transposed = _WEIGHTS[type(call.node).__name__][1]
    if is_transposed:
        inputs, outputs = factors.grad_outputs, of_x.inputs
    else:
        inputs, outputs = factors.inputs, of_x.grad_outputs
    count = norm.x.numel() // norm.x.shape[1]
    statistics = BatchStatistics(
        inputs,
        outputs,
        _units(outputs),
        count,
        norm.mean,
        norm.scale,
        norm.shifts,
        norm.scales,
        is_transposed,
    )
    return replace(factors, correction=statistics)


def _units(operand: Operand) -> Operand | None:
    """Return ones where a grouped operand has values, ``None`` for others."""
    if isinstance(operand, Regrouped):
        units = _units(operand.operand)
        return None if units is None else replace(operand, operand=units)
    if not isinstance(operand, GroupedDense):
        return None
    return replace(operand, values=torch.ones_like(operand.values))
