"""Rules for matrix products: a weight's gradient is one of inputs and output gradients."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional

from tda_lightning.gradients.factors import GradientFactors
from tda_lightning.gradients.nodes.rule import Contribution, NodeCall, node_rule, per_sample_vjp


def _rows(output: Sequence[int], parameter: Sequence[int], position: int) -> Sequence[int]:
    """Samples are rows of the product, or columns if the weight is the left factor."""
    return (1,) if position == 1 else (0,)


def _mm_rows(output: Sequence[int], parameter: Sequence[int], position: int) -> Sequence[int]:
    return (1,) if position == 0 else (0,)


def sum_to_shape(values: Tensor, shape: Sequence[int], n: int) -> Tensor:
    """Sum per-sample gradients ``(n, ...)`` over the axes along which a tensor was broadcast."""
    padded = (1,) * (values.ndim - 1 - len(shape)) + tuple(shape)
    return values.sum_to_size(n, *padded).reshape(n, *shape)


@node_rule("AddmmBackward0", axes=_rows)
def _addmm(call: NodeCall) -> Contribution:
    factor = call.saved("beta" if call.position == 0 else "alpha")
    if factor != 1:
        return per_sample_vjp(call)
    return (
        _addend(call) if call.position == 0 else _product(call, "mat1", "mat2", call.position == 1)
    )


@node_rule("MmBackward0", axes=_mm_rows)
def _mm(call: NodeCall) -> Contribution:
    return _product(call, "self", "mat2", call.position == 0)


def _addend(call: NodeCall) -> Tensor:
    """Return the gradient of a bias: the sum of the output's over each sample's rows."""
    if len(call.shape) > 1 and call.shape[0] != 1:
        return per_sample_vjp(call)
    rows = call.rows(call.grad).rows
    total = rows if len(rows) == call.n else rows.view(call.n, -1, rows.shape[1]).sum(dim=1)
    return total if total.shape[1:] == call.shape else sum_to_shape(total, call.shape, call.n)


def _product(call: NodeCall, left: str, right: str, is_left: bool) -> Contribution:
    """Return the gradient of one factor of a matrix product.

    The weight is usually on the right, ``(d_in, d_out)``, and the samples are rows on the left.
    """
    if is_left:
        layout = call.layout
        turned = replace(call, layout=replace(layout, axis=0))
        inputs, grads = turned.rows(call.saved(right).mT), turned.rows(call.grad.mT)
        return GradientFactors(inputs=inputs, grad_outputs=grads)
    return GradientFactors(inputs=call.rows(call.grad), grad_outputs=call.rows(call.saved(left)))


@node_rule("BmmBackward0", axes=lambda output, parameter, position: (1, 0, 2))
def _bmm(call: NodeCall) -> Contribution:
    return _stacked(call, "self", 1)


@node_rule("BaddbmmBackward0", axes=lambda output, parameter, position: (1, 0, 2))
def _baddbmm(call: NodeCall) -> Contribution:
    return per_sample_vjp(call) if call.saved("alpha") != 1 else _stacked(call, "batch1", 2)


def _stacked(call: NodeCall, left: str, position: int) -> Contribution:
    """Return the gradient of a stack of weights ``(b, d_in, d_out)``, one per entry of a batch."""
    if call.position != position or call.layout.axis != 1:
        return per_sample_vjp(call)
    inputs, grads = call.saved(left), call.grad
    wide = torch.promote_types(inputs.dtype, torch.float32)
    first = [_entries(call, x.to(wide)) for x in (inputs, grads)]
    return torch.einsum("nbsi,nbso->nbio", *first)


def _entries(call: NodeCall, values: Tensor) -> Tensor:
    """Return ``(b, outer * n * inner, d)`` as ``(n, b, s, d)``."""
    parts = call.samples_first(values)
    return parts.reshape(call.n, values.shape[0], -1, values.shape[2])


@node_rule("GroupedMmBackward0", axes=lambda output, parameter, position: (0,))
def _grouped_mm(call: NodeCall) -> Contribution:
    """Return the gradient of a stack of experts, each of which sees some rows in succession."""
    inputs, grads = call.saved("self"), call.grad
    owners = call.layout.owners(len(grads), call.n).to(grads.device)
    wide = torch.promote_types(inputs.dtype, torch.float32)
    result = torch.zeros(call.n, *call.shape, dtype=wide, device=inputs.device)
    start = 0
    for expert, end in enumerate(call.saved("offs").tolist()):
        rows = slice(start, end)
        of_sample = functional.one_hot(owners[rows], call.n).to(wide).mT  # (n, rows)
        shares = of_sample[:, :, None] * inputs[rows].to(wide)
        result[:, expert] = shares.mT @ grads[rows].to(wide)
        start = end
    return result


@node_rule("MvBackward0", axes=lambda output, parameter, position: (0,))
def _mv(call: NodeCall) -> Contribution:
    if call.position != 1:
        return per_sample_vjp(call)
    matrix = call.samples_first(call.saved("self")).reshape(call.n, -1, call.shape[0])
    grad = call.samples_first(call.grad).reshape(call.n, -1)
    return torch.einsum("nsd,ns->nd", matrix, grad)
