"""Rules for elementwise operations and broadcasts: scales, shifts, tables that samples share."""

from __future__ import annotations

from math import prod

from torch import Tensor

from tda_lightning.gradients.nodes.rule import (
    Contribution,
    NodeCall,
    broadcast_axes,
    node_rule,
    per_sample_vjp,
)


def _sum_broadcast(call: NodeCall, values: Tensor) -> Tensor:
    """Sum a value per entry of the output to per-sample gradients, ``(n, *shape)``.

    The parameter-only input was broadcast along the axis of the samples, and maybe along others.
    """
    layout, n, shape = call.layout, call.n, call.shape
    # The entries of a sample are summed: the input has length one on that axis, or none.
    parts = layout.unflattened(values, n).movedim(layout.axis + 1, 0)
    summed = parts.sum(dim=(layout.axis + 1, layout.axis + 2)).unsqueeze(layout.axis + 1)
    padded = (1,) * (values.ndim - len(shape)) + tuple(shape)
    total: Tensor = summed.sum_to_size(n, *padded)
    return total.reshape(n, *shape)


@node_rule("AddBackward0", "SubBackward0", axes=broadcast_axes)
def _add(call: NodeCall) -> Contribution:
    total = _sum_broadcast(call, call.grad)
    if call.position == 0:
        return total
    sign = -1 if type(call.node).__name__ == "SubBackward0" else 1
    factor = sign * call.saved("alpha")
    return total if factor == 1 else total * factor


@node_rule("MulBackward0", axes=broadcast_axes)
def _mul(call: NodeCall) -> Contribution:
    other = call.saved("other" if call.position == 0 else "self")
    return per_sample_vjp(call) if other is None else _sum_broadcast(call, call.grad * other)


@node_rule("ExpandBackward0", axes=broadcast_axes)
def _expand(call: NodeCall) -> Contribution:
    return _sum_broadcast(call, call.grad)


@node_rule("RepeatBackward0", axes=broadcast_axes)
def _repeat(call: NodeCall) -> Contribution:
    """Sum the repetitions of each sample; only those of the first axis can be the batch."""
    is_on_first_axis = call.grad.ndim == len(call.shape) and call.grad.shape[1:] == call.shape[1:]
    if call.layout.axis != 0 or not is_on_first_axis:
        return per_sample_vjp(call)
    first = call.samples_first(call.grad)
    if first[0].numel() != prod(call.shape):
        return per_sample_vjp(call)
    return first.reshape(call.n, *call.shape)


@node_rule("PreluKernelBackward0", axes=broadcast_axes)
def _prelu(call: NodeCall) -> Contribution:
    return _sum_broadcast(call, call.saved("self").clamp_max(0) * call.grad)
