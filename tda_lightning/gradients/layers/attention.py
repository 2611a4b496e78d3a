"""Rule for ``nn.MultiheadAttention``: recompute the attention between its two projections.

The layer projects, attends and projects again in a single call. So hooks see neither the input of
the output projection, nor the gradient with respect to the projected inputs. The attention between
the projections has no parameters. The rule calls the same function again on the projected inputs,
with identity matrices for the projections. It restores the random state to get the same dropout.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from tda_lightning.gradients.factors import Dense, GradientFactors, WithOnes
from tda_lightning.gradients.layers.rule import LayerCall, layer_rule, one_column

_SEPARATE_WEIGHTS = ("q_proj_weight", "k_proj_weight", "v_proj_weight")
_OUT = ("out_proj.weight", "out_proj.bias")


def _has_dropout(module: nn.MultiheadAttention) -> bool:
    return module.training and module.dropout > 0


@layer_rule(
    nn.MultiheadAttention,
    parameters=("in_proj_weight", "in_proj_bias", *_SEPARATE_WEIGHTS, *_OUT),
    apart=(*_SEPARATE_WEIGHTS, *_OUT),
    draws=_has_dropout,
)
def _attention(call: LayerCall) -> GradientFactors:
    arguments = _bound_arguments(call)
    sequences = [_time_first(call, arguments[name]) for name in ("query", "key", "value")]
    if "out_proj.bias" in call.names:
        return one_column(_output_grad(call).sum(dim=0))
    with torch.enable_grad():
        projected = [x.requires_grad_() for x in _project_inputs(call.module, sequences)]
        heads, weights = _attend(call, projected, arguments)
    if "out_proj.weight" in call.names:
        return GradientFactors(_dense(heads.detach()), _dense(_output_grad(call)))
    output, grad = heads, _output_grad(call) @ call.module.out_proj.weight.detach()
    if call.output == 1:
        assert weights is not None
        output, grad = weights, call.output_grad
    input_grads = torch.autograd.grad(output, projected, grad, allow_unused=True)
    pairs = zip(projected, input_grads, strict=True)
    grads = [torch.zeros_like(x) if grad is None else grad for x, grad in pairs]
    return _input_projection_factors(call, sequences, grads)


def _bound_arguments(call: LayerCall) -> dict[str, Any]:
    bound = inspect.signature(nn.MultiheadAttention.forward).bind(
        call.module, *call.args, **call.kwargs
    )
    bound.apply_defaults()
    return bound.arguments


def _time_first(call: LayerCall, x: Tensor) -> Tensor:
    return x.detach().transpose(0, 1) if call.module.batch_first else x.detach()


def _output_grad(call: LayerCall) -> Tensor:
    """Return the gradient of the output projection's result, time first; zeros if unused."""
    grad = call.output_grad
    if call.output == 1:  # The attention weights do not depend on the output projection.
        return grad.new_zeros(grad.shape[-2], len(grad), call.module.embed_dim)
    return grad.transpose(0, 1) if call.module.batch_first else grad


def _project_inputs(module: nn.MultiheadAttention, sequences: list[Tensor]) -> list[Tensor]:
    packed = module.in_proj_weight
    # Weights are separate if keys or values have another width.
    weights = (
        packed.chunk(3)
        if packed is not None
        else [getattr(module, name) for name in _SEPARATE_WEIGHTS]
    )
    biases = [None] * 3 if module.in_proj_bias is None else module.in_proj_bias.chunk(3)
    return [
        functional.linear(x, weight, bias).detach()
        for x, weight, bias in zip(sequences, weights, biases, strict=True)
    ]


def _attend(
    call: LayerCall, projected: list[Tensor], arguments: dict[str, Any]
) -> tuple[Tensor, Tensor | None]:
    module = call.module
    query, key, value = projected
    identity = torch.eye(module.embed_dim, device=projected[0].device, dtype=projected[0].dtype)
    with call.preserved_rng():
        heads, weights = functional.multi_head_attention_forward(
            query,
            key,
            value,
            module.embed_dim,
            module.num_heads,
            in_proj_weight=None,
            in_proj_bias=None,
            bias_k=None,
            bias_v=None,
            add_zero_attn=module.add_zero_attn,
            dropout_p=module.dropout,
            out_proj_weight=identity,
            out_proj_bias=None,
            training=module.training,
            key_padding_mask=arguments["key_padding_mask"],
            need_weights=arguments["need_weights"],
            attn_mask=arguments["attn_mask"],
            use_separate_proj_weight=True,
            q_proj_weight=identity,
            k_proj_weight=identity,
            v_proj_weight=identity,
            average_attn_weights=arguments["average_attn_weights"],
            is_causal=arguments["is_causal"],
        )
    return heads, weights


def _input_projection_factors(
    call: LayerCall, sequences: list[Tensor], grads: list[Tensor]
) -> GradientFactors:
    for place, name in enumerate(_SEPARATE_WEIGHTS):
        if name in call.names:
            return GradientFactors(_dense(sequences[place]), _dense(grads[place]))
    if "in_proj_weight" not in call.names:
        return one_column(torch.cat([grad.sum(dim=0) for grad in grads], dim=1))
    # Each sequence contributes to one third of the rows: pad the other two with zeros.
    thirds = [functional.pad(grad, _padding(place, grad)) for place, grad in enumerate(grads)]
    inputs = _dense(torch.cat(sequences))
    return GradientFactors(
        WithOnes(inputs) if "in_proj_bias" in call.names else inputs, _dense(torch.cat(thirds))
    )


def _padding(place: int, grad: Tensor) -> tuple[int, int]:
    width = grad.shape[2]
    return place * width, (2 - place) * width


def _dense(time_first: Tensor) -> Dense:
    return Dense(time_first.transpose(0, 1))
