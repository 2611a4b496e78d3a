"""Layer rules: how each type of layer turns what hooks see into :class:`GradientFactors`.

A rule is one function from ``(module, x, grad)``, the layer's input and the gradient of its output,
to factors whose outer products lie as :func:`as_matrix` lays out the layer's parameters. Layer
types end in this file. Add one with ``@layer_rule(MyLayer)``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from tda_lightning.factors import Dense, GradientFactors, OneHot, Operand, Patches2d, WithOnes
from tda_lightning.recipe import Block, LeftOut

Factors = Callable[[Any, Tensor, Tensor], GradientFactors]
Layout = Callable[[Sequence[Tensor]], Float[Tensor, "rows columns"]]
Obstacle = Callable[[Any], str]

# These call their children's weights without calling the children, so hooks on those see nothing.
_BYPASS_CHILDREN = (nn.MultiheadAttention,)


def as_matrix(tensors: Sequence[Tensor]) -> Float[Tensor, "rows columns"]:
    """Flatten a weight to a matrix, with its bias as last column; or a bias alone to a column."""
    first, *rest = tensors
    return torch.cat([first.flatten(1) if first.ndim > 1 else first[:, None], *_columns(rest)], 1)


def as_column(tensors: Sequence[Tensor]) -> Float[Tensor, "rows 1"]:
    """Stack all parameters in one column."""
    return torch.cat([tensor.flatten() for tensor in tensors])[:, None]


def _columns(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [tensor[:, None] for tensor in tensors]


def _no_obstacle(module: nn.Module) -> str:
    return ""


@dataclass(frozen=True)
class LayerRule:
    """How a type of layer is recorded.

    Attributes:
        factors: From the module, its input and the gradient of its output to gradient factors.
        layout: From the layer's trainable parameters, or their gradients, to the block's matrix.
        obstacle: Why this very module cannot be recorded, or nothing.
    """

    factors: Factors
    layout: Layout
    obstacle: Obstacle


_RULES: dict[type[nn.Module], LayerRule] = {}


def layer_rule(
    layer: type[nn.Module], *, layout: Layout = as_matrix, obstacle: Obstacle = _no_obstacle
) -> Callable[[Factors], Factors]:
    """Register the decorated function as the rule for ``layer``.

    The function receives the module, the first tensor it was called with, shape ``(n, ...)``, and
    the gradient with respect to its output, of the output's shape.

    Args:
        layer: The type of layer. Subclasses share the rule if they keep its ``forward``.
        layout: How the layer's trainable parameters lie in the block that the factors span.
        obstacle: Says why a module of this type cannot be recorded after all, or nothing.
    """

    def register(factors: Factors) -> Factors:
        _RULES[layer] = LayerRule(factors, layout, obstacle)
        return factors

    return register


def find_rule(module: nn.Module) -> LayerRule | None:
    """Return the rule for ``module``, or ``None``."""
    for layer in type(module).__mro__:
        if layer in _RULES and type(module).forward is layer.forward:
            return _RULES[layer]
    return None


def own_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """Return the trainable parameters that ``module`` itself owns."""
    return {
        name: parameter
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.requires_grad
    }


def find_blocks(
    model: nn.Module, layers: Sequence[str] | None = None
) -> tuple[tuple[Block, ...], tuple[LeftOut, ...]]:
    """List what of ``model`` can be recorded, and what is left out and why.

    Args:
        model: Any module.
        layers: Names of the modules to record, with ``*`` for any characters; all by default.

    Returns:
        Blocks in the order of ``named_modules``, and the trainable parameters left out.

    Raises:
        ValueError: If an entry of ``layers`` matches nothing that is trained, or no supported layer
            is left.
    """
    blocks: list[Block] = []
    left_out: list[LeftOut] = []
    shared = _shared_parameters(model)
    for name, module, bypassed in _trained_modules(model):
        rule = find_rule(module)
        reason = _why_left_out(name, module, bypassed, shared, layers)
        if rule is None or reason:
            size = sum(parameter.numel() for parameter in own_parameters(module).values())
            left_out.append(LeftOut(name, type(module).__name__, size, reason))
        else:
            blocks.append(_block(name, module, rule))
    _require_matches(layers, [*blocks, *left_out])
    _require_some(blocks, left_out)
    return tuple(blocks), tuple(left_out)


def _block(name: str, module: nn.Module, rule: LayerRule) -> Block:
    parameters = own_parameters(module)
    full_names = tuple(f"{name}.{own}" if name else own for own in parameters)
    rows, columns = rule.layout([parameter.detach() for parameter in parameters.values()]).shape
    return Block(name, type(module).__name__, full_names, rows, columns)


def _trained_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module, bool]]:
    bypassed: set[nn.Module] = set()
    for name, module in model.named_modules():
        if isinstance(module, _BYPASS_CHILDREN):
            bypassed.update(child for child in module.modules() if child is not module)
        if own_parameters(module):
            yield name, module, module in bypassed


def _shared_parameters(model: nn.Module) -> set[nn.Parameter]:
    owners: dict[nn.Parameter, int] = {}
    for module in model.modules():
        for parameter in own_parameters(module).values():
            owners[parameter] = owners.get(parameter, 0) + 1
    return {parameter for parameter, count in owners.items() if count > 1}


def _why_left_out(
    name: str,
    module: nn.Module,
    bypassed: bool,
    shared: set[nn.Parameter],
    layers: Sequence[str] | None,
) -> str:
    """Return the reason why a module cannot be recorded, or nothing."""
    if layers is not None and not any(fnmatchcase(name, pattern) for pattern in layers):
        return "not among `layers`"
    if bypassed:
        return "its parent uses its weight without calling it"
    rule = find_rule(module)
    if rule is None:
        return f"no layer rule for `{type(module).__name__}`; add one with `@layer_rule`"
    if shared & set(own_parameters(module).values()):
        return "its parameters are shared with another layer"
    return rule.obstacle(module)


def _require_matches(layers: Sequence[str] | None, trained: Sequence[Block | LeftOut]) -> None:
    names = [entry.name for entry in trained]
    for pattern in layers or ():
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ValueError(
                f"`layers` names `{pattern}`, which matches no layer with trainable parameters; "
                f"expected names out of {names}. Correct the name, or use `*` as a wildcard."
            )


def _require_some(blocks: Sequence[Block], left_out: Sequence[LeftOut]) -> None:
    if not blocks:
        found = "; ".join(f"`{entry.name}`: {entry.reason}" for entry in left_out) or "none at all"
        supported = ", ".join(sorted(layer.__name__ for layer in _RULES))
        raise ValueError(
            "The model has no layer that can be recorded: expected at least one trainable layer "
            f"out of {supported}; found {found}. Add a rule with `@layer_rule`."
        )


def _flat_positions(values: Tensor) -> Float[Tensor, "n s d"]:
    return values.reshape(len(values), -1, values.shape[-1])


def _is_trained(parameter: Tensor | None) -> bool:
    return parameter is not None and parameter.requires_grad


def _one_column(gradients: Float[Tensor, "n d"]) -> GradientFactors:
    ones = gradients.new_ones(len(gradients), 1, 1)
    return GradientFactors(Dense(ones), Dense(gradients[:, None]))


def _affine(
    module: nn.Linear | nn.Conv2d, inputs: Operand, grads: Float[Tensor, "n s rows"]
) -> GradientFactors:
    if not _is_trained(module.weight):
        return _one_column(grads.sum(dim=1))
    with_bias = WithOnes(inputs) if _is_trained(module.bias) else inputs
    return GradientFactors(with_bias, Dense(grads))


@layer_rule(nn.Linear)
def _linear(module: nn.Linear, x: Tensor, grad: Tensor) -> GradientFactors:
    return _affine(module, Dense(_flat_positions(x)), _flat_positions(grad))


def _grouped(module: nn.Conv2d) -> str:
    return f"no rule for a convolution in {module.groups} groups" if module.groups > 1 else ""


@layer_rule(nn.Conv2d, obstacle=_grouped)
def _conv2d(module: nn.Conv2d, x: Tensor, grad: Tensor) -> GradientFactors:
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    # The same private field that the layer's own forward pads with; it resolves padding="same".
    padded = functional.pad(x, module._reversed_padding_repeated_twice, mode=mode)
    patches = Patches2d(padded, module.kernel_size, module.stride, module.dilation)  # type: ignore[arg-type]
    return _affine(module, patches, grad.flatten(2).mT)


def _mixes_samples(module: nn.Embedding) -> str:
    if module.max_norm is not None:
        return "`max_norm` changes the weight during the forward pass"
    if module.scale_grad_by_freq:
        return "`scale_grad_by_freq` mixes the samples of a batch"
    return ""


@layer_rule(nn.Embedding, obstacle=_mixes_samples)
def _embedding(module: nn.Embedding, x: Tensor, grad: Tensor) -> GradientFactors:
    indices = x.reshape(len(x), -1)
    grads = _flat_positions(grad)
    if module.padding_idx is not None:
        grads = grads.masked_fill((indices == module.padding_idx)[..., None], 0.0)
    return GradientFactors(Dense(grads), OneHot(indices, module.num_embeddings))


@layer_rule(nn.LayerNorm, layout=as_column)
def _layer_norm(module: nn.LayerNorm, x: Tensor, grad: Tensor) -> GradientFactors:
    normalized = functional.layer_norm(x, module.normalized_shape, eps=module.eps)
    parts = []
    if _is_trained(module.weight):
        parts.append(_per_sample(grad * normalized, module))
    if _is_trained(module.bias):
        parts.append(_per_sample(grad, module))
    return _one_column(torch.cat(parts, dim=1))


def _per_sample(values: Tensor, module: nn.LayerNorm) -> Float[Tensor, "n d"]:
    size = module.weight.numel()
    return values.reshape(len(values), -1, size).sum(dim=1)
