"""Rules for several nodes of one kind and shape at once: one operation serves all of them.

Small layers cost little arithmetic, but many operations. Their gradients wait until the pass back
is over, and are then computed together. All samples lie on the first axis, one after another.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class StackedFactors:
    """Factors of the gradients of several weights, as :class:`GradientFactors` are of one.

    Attributes:
        inputs: Shape ``(k, n * s, columns)``.
        grad_outputs: Shape ``(k, n * s, rows)``.
    """

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


def coarser(first: torch.dtype, second: torch.dtype) -> torch.dtype:
    """Return the number format with the larger rounding error."""
    if first is second:
        return first
    return max(first, second, key=lambda dtype: torch.finfo(dtype).eps)


def stacked_rule_for(node: Any) -> StackedRule | None:
    """Return the rule for a kind of node, if it can be recorded together with others."""
    return _RULES.get(type(node).__name__)


def _sum_per_sample(values: Tensor, n: int) -> Float[Tensor, "k n d"]:
    """Sum ``(k, n * s, ..., d)`` over the entries of each sample."""
    by_sample = values.reshape(len(values), n, -1, values.shape[-1])
    return by_sample[:, :, 0] if by_sample.shape[2] == 1 else by_sample.sum(dim=2)


def _addmm_saved(node: Any) -> tuple[Tensor, ...] | None:
    # A checkpoint lets a tensor be read once only.
    if node._raw_saved_mat1.unpack_hook is not None:
        return None
    return (node._saved_mat1,) if node._saved_alpha == 1 == node._saved_beta else None


def _mm_saved(node: Any) -> tuple[Tensor, ...] | None:
    return None if node._raw_saved_self.unpack_hook is not None else (node._saved_self,)


def _product(position: int, values: Sequence[Tensor], n: int) -> StackedFactors | Tensor:
    grads, inputs = values
    if position == 0:
        return _sum_per_sample(grads, n)
    return StackedFactors(inputs=grads, grad_outputs=inputs)


def _mm_product(position: int, values: Sequence[Tensor], n: int) -> StackedFactors | Tensor:
    return StackedFactors(inputs=values[0], grad_outputs=values[1])


def _layer_norm_saved(node: Any) -> tuple[Tensor, ...] | None:
    if node._raw_saved_input.unpack_hook is not None:
        return None
    return node._saved_input, node._saved_result1, node._saved_result2


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
