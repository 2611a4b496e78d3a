"""Rules: how a type of layer turns what hooks see into gradient factors.

A rule is one function from a :class:`LayerCall` to
:class:`~tda_lightning.gradients.factors.GradientFactors` whose outer products lie as the rule's
layout lays out the layer's parameters. Layer types end in this folder. Add one with
``@layer_rule(MyLayer)``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tda_lightning.gradients.factors import Dense, GradientFactors
from tda_lightning.gradients.layers.tensors import find_tensors


@dataclass(frozen=True)
class LayerCall:
    """One call of a layer, seen from its backward pass.

    Attributes:
        module: The layer.
        args: What it was called with.
        kwargs: What it was called with, by name.
        names: Those of its own parameters that the block holds.
        output: Which of the tensors in its output the gradient belongs to.
        output_grad: Gradient of the loss with respect to that tensor, of its shape.
        batch_dim: Axis of the samples.
        random_state: State of the random number generator when it was called, if it draws.
    """

    module: Any
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    names: tuple[str, ...]
    output: int
    output_grad: Tensor
    batch_dim: int = 0
    random_state: Tensor | None = None

    @contextmanager
    def preserved_rng(self) -> Iterator[None]:
        """Draw what the layer drew, and leave the user's random numbers alone."""
        device = self.output_grad.device
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            if self.random_state is not None:
                set_random_state(device, self.random_state)
            yield

    @property
    def input(self) -> Tensor:
        """The first tensor that the layer was called with, samples first."""
        x = next(find_tensors((self.args, self.kwargs)))
        return x if self.batch_dim == 0 else x.movedim(self.batch_dim, 0)

    @property
    def grad(self) -> Tensor:
        """Gradient with respect to the layer's output, samples first."""
        return self.output_grad.movedim(self.batch_dim, 0)

    @property
    def n(self) -> int:
        """Number of samples."""
        return self.output_grad.shape[self.batch_dim]


def random_state(device: torch.device) -> Tensor:
    """Return the state of the random number generator of a device."""
    if device.type == "cuda":
        return torch.cuda.get_rng_state(device)
    return torch.get_rng_state()


def set_random_state(device: torch.device, state: Tensor) -> None:
    """Set the state of the random number generator of a device."""
    if device.type == "cuda":
        torch.cuda.set_rng_state(state, device)
    else:
        torch.set_rng_state(state)


Factors = Callable[[LayerCall], GradientFactors]
Layout = Callable[[Sequence[Tensor]], Float[Tensor, "rows columns"]]
Obstacle = Callable[[Any], str]
IsShared = Callable[[Any, int], bool]
Draws = Callable[[Any], bool]


def as_matrix(tensors: Sequence[Tensor]) -> Float[Tensor, "rows columns"]:
    """Flatten a weight to a matrix, with its bias as last column; or a bias alone to a column."""
    first, *rest = tensors
    matrix = first.flatten(1) if first.ndim > 1 else first[:, None]
    return torch.cat([matrix, *(tensor[:, None] for tensor in rest)], dim=1)


def as_column(tensors: Sequence[Tensor]) -> Float[Tensor, "rows 1"]:
    """Stack all parameters in one column."""
    return torch.cat([tensor.flatten() for tensor in tensors])[:, None]


def one_column(gradients: Float[Tensor, "n d"]) -> GradientFactors:
    """Return the factors of gradients that are simply there, for :func:`as_column`."""
    ones = gradients.new_ones(len(gradients), 1, 1)
    return GradientFactors(Dense(ones), Dense(gradients[:, None]))


def no_obstacle(module: nn.Module) -> str:
    """Say that nothing stands in the way."""
    return ""


def never_shared(first: Tensor, n: int) -> bool:
    """Say that every call has its samples."""
    return False


def never_draws(module: nn.Module) -> bool:
    """Say that no random numbers are drawn."""
    return False


@dataclass(frozen=True)
class LayerRule:
    """How a type of layer is recorded.

    Attributes:
        factors: From a call of the layer to gradient factors.
        parameters: The layer's own parameters that the rule knows.
        layout: From the layer's trained parameters, or their gradients, to the block's matrix.
        apart: Parameters that do not fit into that matrix, and get blocks of their own.
        obstacle: Why this very module cannot be recorded, or nothing.
        is_shared: Says, of the first tensor that the layer is called with and the number of
            samples, whether the call is for all samples at once. The rule then sees that tensor,
            and a gradient with an axis of samples in front.
        draws: Says whether a call of this very module draws random numbers that the rule wants to
            draw again.
    """

    factors: Factors
    parameters: tuple[str, ...]
    layout: Layout = as_matrix
    apart: tuple[str, ...] = ()
    obstacle: Obstacle = no_obstacle
    is_shared: IsShared = never_shared
    draws: Draws = never_draws


_RULES: dict[type[nn.Module], LayerRule] = {}


def layer_rule(
    layer: type[nn.Module],
    *,
    parameters: tuple[str, ...] = ("weight", "bias"),
    layout: Layout = as_matrix,
    apart: tuple[str, ...] = (),
    obstacle: Obstacle = no_obstacle,
    is_shared: IsShared = never_shared,
    draws: Draws = never_draws,
) -> Callable[[Factors], Factors]:
    """Register the decorated function, from a call to gradient factors, as the rule for ``layer``.

    Args:
        layer: The type of layer. Subclasses share the rule if they keep its ``forward``.
        parameters: The layer's own parameters that the function takes care of.
        layout: How the layer's trained parameters lie in the block that the factors span.
        apart: Parameters that get blocks of their own; the function is called once per block.
        obstacle: Says why a module of this type cannot be recorded after all, or nothing.
        is_shared: Says whether a call is for all samples at once, from its first tensor and the
            number of samples; the function then gets a gradient with the samples in front.
        draws: Says whether a call draws random numbers that the function wants to draw again.
    """

    def register(factors: Factors) -> Factors:
        _RULES[layer] = LayerRule(factors, parameters, layout, apart, obstacle, is_shared, draws)
        return factors

    return register


def registered_rule(module: nn.Module, names: Sequence[str]) -> LayerRule | None:
    """Return the rule registered for the type of ``module``, if it knows these parameters."""
    for layer in type(module).__mro__:
        rule = _RULES.get(layer)
        if (
            rule
            and type(module).forward is getattr(layer, "forward", None)
            and set(names) <= set(rule.parameters)
        ):
            return rule
    return None
