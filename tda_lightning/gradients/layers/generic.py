"""The generic rule: per-sample vector-Jacobian products of any module with parameters.

The rule calls the module again for every sample: in one ``vmap``, or in a loop where a layer does
not support ``vmap``. It computes the parameters' gradients in full, so it is slower than the other
rules. It is correct for every module that processes samples independently and draws no random
numbers.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vjp, vmap
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.utils import parametrize
from torch.utils._pytree import tree_flatten, tree_unflatten

from tda_lightning.gradients.factors import GradientFactors
from tda_lightning.gradients.layers.rule import (
    LayerCall,
    LayerRule,
    as_column,
    find_tensors,
    one_column,
)


def _obstacle(module: nn.Module) -> str:
    # The reasons are part of the stored recipe: a resumed run must give the same ones.
    for inner in module.modules():
        if isinstance(inner, _BatchNorm):
            return "its parameters act together with batch statistics; give them their own module"
        if isinstance(inner, parametrize.ParametrizationList) and any(inner.buffers()):
            return "its parametrization keeps buffers that every call changes"
        # Recurrent layers and attention store their dropout as a number.
        rate = inner.p if isinstance(inner, _DropoutNd) else getattr(inner, "dropout", 0.0)
        if isinstance(rate, float) and rate > 0:
            return f"its parameters act together with dropout ({rate}); set it to 0"
    return ""


def sample_axis(module: nn.Module, place: int, declared: int) -> int:
    """Return the axis of the samples in one of a layer's input or output tensors.

    Args:
        module: The layer.
        place: Number of the tensor among the inputs, or among the outputs.
        declared: The axis for layers that have the samples on the same axis in all tensors.
    """
    if isinstance(module, nn.MultiheadAttention):  # Attention weights are always samples first.
        return 0 if module.batch_first or place == 1 else 1
    if isinstance(module, nn.RNNBase):  # Hidden states always have the samples on axis 1.
        return 0 if module.batch_first and place == 0 else 1
    return declared


def _per_sample_vjp(call: LayerCall) -> GradientFactors:
    parameters = {name: call.module.get_parameter(name).detach() for name in call.names}
    leaves, structure = tree_flatten((call.args, dict(call.kwargs)))
    axes = _axes(leaves, call)
    samples = [(leaf, axis) for leaf, axis in zip(leaves, axes, strict=True) if axis is not None]

    def gradient(parts: list[Tensor], grad: Tensor) -> Tensor:
        batches_of_one = iter(
            part.unsqueeze(axis) for part, (_, axis) in zip(parts, samples, strict=True)
        )
        sample_leaves = [
            leaf if axis is None else next(batches_of_one)
            for leaf, axis in zip(leaves, axes, strict=True)
        ]

        def forward(values: dict[str, Tensor]) -> Tensor:
            args, kwargs = tree_unflatten(sample_leaves, structure)
            outputs = functional_call(call.module, values, args, kwargs)
            return list(find_tensors(outputs))[call.output]

        differentiate = _by_autograd if _is_recurrent(call) else _by_vjp
        grads = differentiate(forward, parameters, grad.unsqueeze(call.batch_dim))
        return torch.cat([grads[name].flatten() for name in call.names])

    return one_column(_map_over_samples(call, gradient, samples))


def _is_recurrent(call: LayerCall) -> bool:
    """Return whether the layer runs a kernel that ``torch.func`` does not support."""
    return isinstance(call.module, nn.RNNBase)


_Forward = Callable[[dict[str, Tensor]], Tensor]


def _by_vjp(forward: _Forward, parameters: dict[str, Tensor], grad: Tensor) -> dict[str, Tensor]:
    grads: dict[str, Tensor] = vjp(forward, parameters)[1](grad)[0]
    return grads


def _by_autograd(
    forward: _Forward, parameters: dict[str, Tensor], grad: Tensor
) -> dict[str, Tensor]:
    with torch.enable_grad():
        leaves = {name: value.clone().requires_grad_() for name, value in parameters.items()}
        grads = torch.autograd.grad(forward(leaves), list(leaves.values()), grad)
    return dict(zip(leaves, grads, strict=True))


def _map_over_samples(
    call: LayerCall,
    gradient: Callable[[list[Tensor], Tensor], Tensor],
    samples: list[tuple[Tensor, int]],
) -> Tensor:
    tensors, axes = [leaf for leaf, _ in samples], [axis for _, axis in samples]
    if not _is_recurrent(call):
        with warnings.catch_warnings():
            # Some operations fall back to a loop under vmap, with a long warning.
            warnings.filterwarnings("ignore", message="There is a performance drop")
            batched_gradient = vmap(gradient, in_dims=(axes, call.batch_dim))
            gradients: Tensor = batched_gradient(tensors, call.output_grad)
        return gradients
    parts = zip(*(leaf.unbind(axis) for leaf, axis in samples), strict=True)
    grads = call.output_grad.unbind(call.batch_dim)
    return torch.stack([gradient(list(p), g) for p, g in zip(parts, grads, strict=True)])


def _axes(leaves: list[Any], call: LayerCall) -> list[int | None]:
    """Return the axis of the samples in every leaf of the arguments, ``None`` without one."""
    axes: list[int | None] = []
    for place, leaf in enumerate(leaves):
        axis = sample_axis(call.module, place, call.batch_dim)
        is_batched = isinstance(leaf, Tensor) and leaf.ndim > axis and leaf.shape[axis] == call.n
        axes.append(axis if is_batched else None)
    return axes


def generic_rule(names: tuple[str, ...]) -> LayerRule:
    """Return the generic rule for a module with parameters of these names."""
    return LayerRule(_per_sample_vjp, names, layout=as_column, obstacle=_obstacle)
