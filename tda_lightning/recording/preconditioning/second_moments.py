"""Second moments of Adam-like optimizers at the next step, and their factors by rows and columns.

A moment is the square of the denominator of the optimizer's update.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.optim import Adagrad, Adam, AdamW, NAdam, Optimizer, RAdam, RMSprop

ADAPTIVE = (Adam, AdamW, NAdam, RAdam, RMSprop, Adagrad)
# Parameters whose moments are computed together, in numbers: joining small ones is faster, and
# large ones would need memory.
_MAX_JOINED_NUMBERS = 2**20
# Matrices with more numbers are not stacked.
_MAX_STACKED_NUMBERS = 2**16
# Significant binary digits of a factor: off by 3 % at most, far less than the product of both is.
_BITS = 5
_STATES = ("sum", "exp_avg_sq", "square_avg", "max_exp_avg_sq")

Gradients = Mapping[nn.Parameter, Tensor]
_Group = Mapping[str, object]


def second_moments(
    optimizer: Optimizer, groups: Mapping[nn.Parameter, _Group], gradients: Gradients
) -> dict[nn.Parameter, Tensor]:
    """Return the square of the optimizer's denominator for some parameters, or ones.

    A parameter that is in no group has an empty one. ``gradients`` are those of the next step,
    where they are known.
    """
    moments: dict[nn.Parameter, Tensor] = {}
    for part in _treated_alike(optimizer, groups, gradients):
        joined = _second_moment(optimizer, groups[part[0]], part, gradients)
        sizes = [parameter.numel() for parameter in part]
        for parameter, moment in zip(part, torch.split(joined, sizes), strict=True):
            moments[parameter] = moment.view(parameter.shape)
    return moments


def _treated_alike(
    optimizer: Optimizer, groups: Mapping[nn.Parameter, _Group], gradients: Gradients
) -> Iterator[list[nn.Parameter]]:
    """Yield parameters for which the optimizer has the same settings and counts as many steps."""
    kinds: dict[Any, list[nn.Parameter]] = {}
    for parameter, group in groups.items():
        state = optimizer.state.get(parameter, {})
        settings = id(group), int(state.get("step", 0)), tuple(state), parameter in gradients
        kinds.setdefault((*settings, parameter.dtype, parameter.device), []).append(parameter)
    for alike in kinds.values():
        yield from _parts(alike)


def _parts(parameters: Sequence[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    part: list[nn.Parameter] = []
    total = 0
    for parameter in parameters:
        if part and total + parameter.numel() > _MAX_JOINED_NUMBERS:
            yield part
            part, total = [], 0
        part.append(parameter)
        total += parameter.numel()
    yield part


def _second_moment(
    optimizer: Optimizer,
    group: Mapping[str, object],
    parameters: Sequence[nn.Parameter],
    gradients: Gradients,
) -> Float[Tensor, " m"]:
    """Return the joint square of the optimizer's denominator for parameters treated alike."""
    ones = torch.ones(
        sum(parameter.numel() for parameter in parameters),
        dtype=torch.promote_types(parameters[0].dtype, torch.float32),
        device=parameters[0].device,
    )
    if not isinstance(optimizer, ADAPTIVE) or not group:
        return ones
    states = [optimizer.state.get(parameter, {}) for parameter in parameters]
    state = {
        key: _joined([state[key] for state in states]).to(ones)
        for key in _STATES
        if key in states[0]
    }
    is_new = parameters[0] in gradients
    square = torch.zeros_like(ones)
    if is_new:
        square = _joined([gradients[p].detach() for p in parameters]).to(ones).square()
    age = int(states[0].get("step", 0)) + is_new
    moment = _running_square(group, state, square, age, is_new)
    eps = float(group["eps"])  # type: ignore[arg-type]
    return torch.where(moment > 0, moment + eps**2, 0)


def _joined(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors])


def _running_square(
    group: Mapping[str, object], state: Mapping[str, Tensor], square: Tensor, age: int, is_new: bool
) -> Tensor:
    if "sum" in state or "lr_decay" in group:  # Adagrad
        return square + state["sum"] if "sum" in state else square
    decay = _decay(group)
    before = state.get("exp_avg_sq", state.get("square_avg", torch.zeros_like(square)))
    moment = decay * before + (1 - decay) * square if is_new else before
    if "max_exp_avg_sq" in state:  # amsgrad
        moment = moment.maximum(state["max_exp_avg_sq"])
    if "alpha" in group:  # RMSprop does not correct the bias of its first steps.
        return moment
    return moment / (1 - decay**age) if age else moment


def _decay(group: Mapping[str, object]) -> float:
    betas: Sequence[float] = group.get("betas", (0.0, group.get("alpha", 0.0)))  # type: ignore[assignment]
    return float(betas[1])


def rank_one_factors(
    matrices: Sequence[Tensor],
) -> tuple[Float[Tensor, " rows"], Float[Tensor, " columns"]]:
    """Return factors of several matrices, those of one after those of another.

    The outer product of a matrix's factors has its row sums and its column sums.

    >>> rows, columns = rank_one_factors([torch.tensor([[1.0, 2.0], [3.0, 6.0]])])
    >>> torch.outer(rows, columns)
    tensor([[1., 2.],
            [3., 6.]])
    """
    rows: list[Tensor] = list(matrices)
    columns: list[Tensor] = list(matrices)
    for numbers in _of_one_shape(matrices):
        alike = [matrices[number] for number in numbers]
        stack = alike[0][None] if len(alike) == 1 else torch.stack(alike)
        means = stack.mean(dim=2) if stack.shape[2] > 1 else stack[:, :, 0]
        column_means = stack.mean(dim=1) if stack.shape[1] > 1 else stack[:, 0]
        totals = column_means.mean(dim=1, keepdim=True)
        column_means = column_means / torch.where(totals == 0, 1, totals)
        for number, row, column in zip(numbers, means, column_means, strict=True):
            rows[number], columns[number] = row, column
    return torch.cat(rows), torch.cat(columns)


def _of_one_shape(matrices: Sequence[Tensor]) -> Iterator[list[int]]:
    """Yield the numbers of matrices of one shape, those of large ones alone: stacks are copies."""
    alike: dict[tuple[int, ...], list[int]] = {}
    for number, matrix in enumerate(matrices):
        if matrix.numel() > _MAX_STACKED_NUMBERS:
            yield [number]
        else:
            alike.setdefault(tuple(matrix.shape), []).append(number)
    yield from alike.values()


def round_to_bits(values: Float[Tensor, " n"], bits: int = _BITS) -> Float[Tensor, " n"]:
    """Round to a number of significant binary digits, half to even.

    >>> round_to_bits(torch.tensor([1.0, 1.03, 1.04, 300.0, 0.0]), bits=5)
    tensor([  1.0000,   1.0000,   1.0625, 304.0000,   0.0000])
    """
    mantissa, exponent = torch.frexp(values)
    return torch.ldexp((mantissa * 2**bits).round(), exponent - bits)


def power(values: Tensor, exponent: float) -> Tensor:
    """Raise to a power. Zero stays zero: weights without a gradient so far have not moved."""
    return torch.where(values > 0, values.clamp_min(1e-38) ** exponent, 0)
