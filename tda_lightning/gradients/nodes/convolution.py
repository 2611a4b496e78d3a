"""Rule for convolutions: a linear map of patches, which are never unfolded."""

from __future__ import annotations

from torch import Tensor

from tda_lightning.gradients.factors import (
    ByChannel,
    GradientFactors,
    GroupedDense,
    Operand,
    Patches,
    Regrouped,
)
from tda_lightning.gradients.nodes.rule import (
    Contribution,
    NodeCall,
    first_axis,
    node_rule,
    per_sample_vjp,
)


@node_rule("ConvolutionBackward0", axes=first_axis)
def _convolution(call: NodeCall) -> Contribution:
    grads = _batch_first(call, call.grad)
    if call.position == 2:
        return grads.reshape(call.n, -1, *grads.shape[1:]).flatten(3).sum(dim=(1, 3))
    if call.position != 1:
        return per_sample_vjp(call)
    images = _batch_first(call, call.saved("input"))
    # A transposed convolution is one whose input and output gradient change places.
    is_transposed = call.saved("transposed")
    patched, plain = (grads, images) if is_transposed else (images, grads)
    groups = call.saved("groups")
    patches = Patches(
        patched,
        call.shape[2:],
        tuple(call.saved("stride")),
        tuple(call.saved("dilation")),
        tuple(call.saved("padding")),
        groups=groups,
        positions=tuple(plain.shape[2:]),
    )
    parts = len(grads) // call.n
    operands: list[Operand] = [patches, _grouped(plain, groups)]
    inputs, outputs = [x if parts == 1 else Regrouped(x, parts) for x in operands]
    return GradientFactors(inputs, outputs)


def _batch_first(call: NodeCall, values: Tensor) -> Tensor:
    """Return images ``(n * parts, channels, ...)``, each sample's one after the other."""
    channels_at = values.ndim - 1 - (len(call.shape) - 2 if call.position == 1 else values.ndim - 2)
    first = call.samples_first(values)
    return first.reshape(-1, *values.shape[channels_at:])


def _grouped(values: Tensor, groups: int) -> Operand:
    """Return ``(n, rows, ...)`` as an operand with one group of rows after the other."""
    flat = values.flatten(2).mT  # (n, s, rows)
    return ByChannel(values.flatten(2)) if groups == 1 else GroupedDense(flat, groups)
