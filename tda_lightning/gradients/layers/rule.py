"""Layer rules: how the calls of a layer type become gradient factors.

A rule is one function from a :class:`LayerCall` to
:class:`~tda_lightning.gradients.factors.GradientFactors`. The outer products of the factors have
the layout that the rule defines for the layer's parameters. Add a rule with
``@layer_rule(MyLayer)``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tda_lightning.gradients.factors import Dense, GradientFactors


@dataclass(frozen=True)
class LayerCall:
    """One call of a layer, with the gradient of its output.

    Attributes:
        module: The layer.
        args: Positional arguments of the call.
        kwargs: Keyword arguments of the call.
        names: Names, within the layer, of the parameters in the block.
        output: Number of the tensor, among those in the layer's output, that has the gradient.
        output_grad: Gradient of the loss with respect to that tensor, of its shape.
        batch_dim: Axis of the samples.
        random_state: State of the random number generator before the call, if the call draws.
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
        """Repeat the random draws of the call, and restore the user's random state on exit."""
        device = self.output_grad.device
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            if self.random_state is not None:
                set_random_state(device, self.random_state)
            yield

    @property
    def input(self) -> Tensor:
        """The first tensor among the layer's arguments, samples first."""
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
    """Flatten a weight to a matrix, with its bias as last column; a lone bias to a column."""
    first, *rest = tensors
    matrix = first.flatten(1) if first.ndim > 1 else first[:, None]
    return torch.cat([matrix, *(tensor[:, None] for tensor in rest)], dim=1)


def as_column(tensors: Sequence[Tensor]) -> Float[Tensor, "rows 1"]:
    """Stack all parameters in one column."""
    return torch.cat([tensor.flatten() for tensor in tensors])[:, None]


def one_column(gradients: Float[Tensor, "n d"]) -> GradientFactors:
    """Return factors of gradients that are already computed, laid out as :func:`as_column`."""
    ones = gradients.new_ones(len(gradients), 1, 1)
    return GradientFactors(Dense(ones), Dense(gradients[:, None]))


def no_obstacle(module: nn.Module) -> str:
    """Return the empty string: any module of the type can be recorded."""
    return ""


def never_shared(first: Tensor, n: int) -> bool:
    """Return ``False``: every call has an axis of samples."""
    return False


def never_draws(module: nn.Module) -> bool:
    """Return ``False``: no call draws random numbers."""
    return False


@dataclass(frozen=True)
class LayerRule:
    """How a type of layer is recorded.

    Attributes:
        factors: From a call of the layer to gradient factors.
        parameters: Names of the layer's parameters that the rule supports.
        layout: From the layer's trained parameters, or their gradients, to the block's matrix.
        apart: Parameters that do not fit into that matrix, and get separate blocks.
        obstacle: Returns why a given module cannot be recorded, or the empty string.
        is_shared: Returns whether a call is for all samples at once, from its first tensor and the
            number of samples. The rule then gets that tensor, and a gradient with an axis of
            samples in front.
        draws: Returns whether a call of a given module draws random numbers that the rule has to
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
        parameters: Names of the layer's parameters that the function supports.
        layout: From the layer's trained parameters to the matrix that the factors span.
        apart: Parameters that get separate blocks; the function is called once per block.
        obstacle: Returns why a given module of this type cannot be recorded, or the empty string.
        is_shared: Returns whether a call is for all samples at once, from its first tensor and the
            number of samples. The function then gets a gradient with the samples in front.
        draws: Returns whether a call draws random numbers that the function has to draw again.
    """

    def register(factors: Factors) -> Factors:
        _RULES[layer] = LayerRule(factors, parameters, layout, apart, obstacle, is_shared, draws)
        return factors

    return register


def registered_rule(module: nn.Module, names: Sequence[str]) -> LayerRule | None:
    """Return the rule registered for the type of ``module``, if it supports these parameters."""
    for layer in type(module).__mro__:
        rule = _RULES.get(layer)
        if (
            rule
            and type(module).forward is getattr(layer, "forward", None)
            and set(names) <= set(rule.parameters)
        ):
            return rule
    return None


def find_tensors(value: Any) -> Iterator[Tensor]:
    """Yield the tensors in nested lists, tuples, mappings and dataclasses, in order."""
    if isinstance(value, Tensor):
        yield value
    else:
        for part in _parts(value):
            yield from find_tensors(part)


def _parts(value: Any) -> Iterable[Any]:
    if isinstance(value, list | tuple):
        return value
    if value is None or isinstance(value, str | int | float):  # Skips the slow check below.
        return ()
    if isinstance(value, Mapping):
        return value.values()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return [getattr(value, field.name) for field in dataclasses.fields(value)]
    return ()
