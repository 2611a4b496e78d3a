"""Slots and rules for several nodes of one kind and shape: one operation serves all of them.

Small layers cost little arithmetic, but many operations. Their gradients wait until the pass back
is over, and are then computed together. All samples lie on the first axis, one after another.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tda_lightning.gradients.factors.gradient_factors import coarser
from tda_lightning.gradients.graph.walk import Edge, Meeting
from tda_lightning.gradients.nodes.saved_values import saved_without_hook


@dataclass(frozen=True)
class StackedFactors:
    """Factors of the gradients of several weights, as :class:`GradientFactors` are of one."""

    inputs: Float[Tensor, "k ns columns"]
    grad_outputs: Float[Tensor, "k ns rows"]

    @property
    def dtype(self) -> torch.dtype:
        """The coarser number format of both."""
        return coarser(self.inputs.dtype, self.grad_outputs.dtype)

    def transposed(self) -> StackedFactors:
        """Return the factors of the transposed gradients."""
        return StackedFactors(self.grad_outputs, self.inputs)


@dataclass(frozen=True, eq=False)
class StackedRule:
    """How nodes of one kind are recorded together.

    Attributes:
        saved: Returns the tensors that a node has saved; ``None`` if it must be recorded alone.
        gradient: Returns the gradients of an input: factors, or ``(k, n, d)``. It takes the
            position of the input, the stacked gradients of the outputs followed by the stacked
            saved tensors, and the number of samples.
        weight: Position of the weight, without which a node saves nothing.
        is_product: Whether the gradients of the weight are factors.
    """

    saved: Callable[[Any], tuple[Tensor, ...] | None]
    gradient: Callable[[int, Sequence[Tensor], int], StackedFactors | Tensor]
    weight: int
    is_product: bool


def _sum_per_sample(values: Tensor, n: int) -> Float[Tensor, "k n d"]:
    """Sum ``(k, n * s, ..., d)`` over the entries of each sample."""
    by_sample = values.reshape(len(values), n, -1, values.shape[-1])
    return by_sample[:, :, 0] if by_sample.shape[2] == 1 else by_sample.sum(dim=2)


def _none_or_tuple(value: Tensor | None) -> tuple[Tensor] | None:
    # A checkpoint lets a tensor be read once only: its nodes are recorded alone.
    return None if value is None else (value,)


def _addmm_saved(node: Any) -> tuple[Tensor, ...] | None:
    if not node._saved_alpha == 1 == node._saved_beta:
        return None
    return _none_or_tuple(saved_without_hook(node, "mat1"))


def _mm_saved(node: Any) -> tuple[Tensor, ...] | None:
    return _none_or_tuple(saved_without_hook(node, "self"))


def _product(position: int, values: Sequence[Tensor], n: int) -> StackedFactors | Tensor:
    grads, inputs = values
    if position == 0:
        return _sum_per_sample(grads, n)
    return StackedFactors(inputs=grads, grad_outputs=inputs)


def _mm_product(position: int, values: Sequence[Tensor], n: int) -> StackedFactors | Tensor:
    return StackedFactors(inputs=values[0], grad_outputs=values[1])


def _layer_norm_saved(node: Any) -> tuple[Tensor, ...] | None:
    inputs = saved_without_hook(node, "input")
    return None if inputs is None else (inputs, node._saved_result1, node._saved_result2)


def _layer_norm(position: int, values: Sequence[Tensor], n: int) -> StackedFactors | Tensor:
    grads, inputs, means, scales = values
    if position == 2:
        return _sum_per_sample(grads, n)
    normalized = (inputs - means).mul_(scales)
    is_wide = torch.result_type(normalized, grads) == normalized.dtype
    return _sum_per_sample(normalized.mul_(grads) if is_wide else normalized * grads, n)


_RULES = {
    "AddmmBackward0": StackedRule(_addmm_saved, _product, 2, is_product=True),
    "MmBackward0": StackedRule(_mm_saved, _mm_product, 1, is_product=True),
    "NativeLayerNormBackward0": StackedRule(_layer_norm_saved, _layer_norm, 1, is_product=False),
}


# Returns the number of the block that a parameter fills, ``None`` if it is a part of one.
BlockOf = Callable[[nn.Parameter], int | None]


@dataclass(frozen=True, eq=False)
class Slot:
    """What nodes must have in common to be recorded together.

    Attributes:
        rule: Returns the gradients of such nodes.
        inputs: For each input its position, its parameter, and whether it is the transposed one.
        blocks: The number of the block of each of these parameters.
        kind: Equal for nodes that can be recorded together, if their outputs have equal shapes.
    """

    rule: StackedRule
    inputs: tuple[tuple[int, nn.Parameter, bool], ...]
    blocks: tuple[int, ...]
    kind: Hashable


def slot_of(meeting: Meeting, block_of: BlockOf) -> Slot | None:
    """Return the slot of a meeting, ``None`` if it is recorded alone."""
    rule = _RULES.get(type(meeting.node).__name__)
    if rule is None or rule.weight not in [position for position, _ in meeting.inputs]:
        return None
    inputs, blocks = [], []
    for position, edge in meeting.inputs:
        parameter, is_transposed = _parameter_of(edge)
        if parameter is None:
            return None
        is_matrix = position == rule.weight and rule.is_product
        block = block_of(parameter)
        if block is None or parameter.ndim != (2 if is_matrix else 1):
            return None
        if not is_matrix and parameter.shape[0] != meeting.shape[-1]:  # It is broadcast.
            return None
        inputs.append((position, parameter, is_transposed))
        blocks.append(block)
    shapes = tuple((position, tuple(p.shape), turned) for position, p, turned in inputs)
    return Slot(rule, tuple(inputs), tuple(blocks), (rule, shapes))


def _parameter_of(edge: Edge) -> tuple[nn.Parameter | None, bool]:
    """Return the parameter that a tensor copies, and whether it transposes it."""
    node, is_transposed = edge[0], False
    while type(node).__name__ in ("TBackward0", "ToCopyBackward0"):
        is_transposed ^= type(node).__name__ == "TBackward0"
        node = node.next_functions[0][0]
    return getattr(node, "variable", None), is_transposed
