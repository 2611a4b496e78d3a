"""Rules for linear layers and convolutions: an affine map, for convolutions one of patches."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional

from tda_lightning.gradients.factors import (
    Dense,
    GradientFactors,
    GroupedDense,
    Operand,
    Patches,
    WithOnes,
)
from tda_lightning.gradients.layers.rule import LayerCall, layer_rule, one_column


def flat_positions(values: Tensor) -> Tensor:
    """Return ``(n, ..., d)`` as ``(n, s, d)``."""
    return values.reshape(len(values), -1, values.shape[-1])


def affine(call: LayerCall, inputs: Operand, grads: Operand, bias_grads: Tensor) -> GradientFactors:
    """Return the factors for the weight and bias of a block, or for one of them.

    Args:
        call: The layer call.
        inputs: Inputs that the weight's columns multiply.
        grads: Gradient with respect to the outputs, one entry per row of the weight.
        bias_grads: The same, shape ``(n, rows, ...)``, for a block with the bias alone.
    """
    if "weight" not in call.names:
        return one_column(bias_grads.flatten(2).sum(dim=2))
    return GradientFactors(WithOnes(inputs) if "bias" in call.names else inputs, grads)


@layer_rule(nn.Linear)
def _linear(call: LayerCall) -> GradientFactors:
    grads = flat_positions(call.grad)
    return affine(call, Dense(flat_positions(call.input)), Dense(grads), grads.mT)


@layer_rule(nn.Conv1d)
@layer_rule(nn.Conv2d)
@layer_rule(nn.Conv3d)
def _convolution(call: LayerCall) -> GradientFactors:
    module = call.module
    x, padding = call.input, module.padding
    if module.padding_mode != "zeros" or isinstance(padding, str):
        mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
        # The layer's forward pads with the same private field, which resolves "same".
        x = functional.pad(x, module._reversed_padding_repeated_twice, mode=mode)
        padding = tuple(0 for _ in module.kernel_size)
    patches = Patches(
        x, module.kernel_size, module.stride, module.dilation, padding, groups=module.groups
    )
    return affine(call, patches, _grouped(call.grad, module.groups), call.grad)


@layer_rule(nn.ConvTranspose1d, apart=("bias",))
@layer_rule(nn.ConvTranspose2d, apart=("bias",))
@layer_rule(nn.ConvTranspose3d, apart=("bias",))
def _transposed_convolution(call: LayerCall) -> GradientFactors:
    """Treat it as a convolution whose input and output gradient are swapped."""
    module = call.module
    patches = Patches(
        call.grad,
        module.kernel_size,
        module.stride,
        module.dilation,
        module.padding,
        groups=module.groups,
        positions=tuple(call.input.shape[2:]),
    )
    return affine(call, patches, _grouped(call.input, module.groups), call.grad)


def _grouped(values: Tensor, groups: int) -> Operand:
    """Return ``(n, rows, ...)`` as an operand with one group of rows after the other."""
    flat = values.flatten(2).mT  # (n, s, rows)
    return Dense(flat) if groups == 1 else GroupedDense(flat, groups)
