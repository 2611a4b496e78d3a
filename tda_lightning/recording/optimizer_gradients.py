r"""Gradients of an optimizer's step: computed before it, measured, scaled and clipped.

Clipping by value changes the direction of a gradient :math:`g`, so no common factor of all samples
reproduces it. The multiple of :math:`g` that is nearest to the clipped gradient has the factor

.. math:: c = \langle \mathrm{clip}(g), \, g \rangle \; / \; \langle g, \, g \rangle

which is 1 where nothing was clipped. Where each parameter's gradient was scaled by another factor,
the same formula, with the norms of the parameters' gradients, combines these factors.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from tda_lightning.gradients.gradient_layouts import entries_of
from tda_lightning.gradients.row_recorder import RowRecorder
from tda_lightning.stores.precision import widest_format


def gradients_of(
    loss: Tensor, parameters: Sequence[Parameter], recorder: RowRecorder
) -> dict[Parameter, Tensor]:
    """Return the gradients of the parameters that the loss depends on, and retain its graph.

    This pass is not recorded by ``recorder``.
    """
    try:
        with recorder.paused():
            gradients = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
    except RuntimeError as error:
        raise ValueError(
            "The gradient of the first steps could not be computed before their backward pass, "
            f"which the coordinates of an adaptive optimizer need: {error} Expected a loss that "
            "can be differentiated twice over one graph. Record raw rows with "
            "`GradientRecorder(preconditioner='none')`."
        ) from error
    pairs = zip(parameters, gradients, strict=True)
    return {parameter: gradient for parameter, gradient in pairs if gradient is not None}


@contextmanager
def second_pass_errors() -> Iterator[None]:
    """Turn errors raised while labels are sampled into errors that name a remedy.

    Raises:
        ValueError: If the graph of the loss cannot be differentiated a second time.
    """
    try:
        yield
    except torch.cuda.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise ValueError(
            f"The backward pass of sampled labels failed: {error} Expected a loss that can be "
            "differentiated twice over one graph. Compile modules instead of functions, or record "
            "with `curvature='none'`."
        ) from error


def first_with_gradient(parameters: Iterable[Parameter]) -> Parameter | None:
    """Return the first parameter whose gradient is not zero, or ``None``."""
    for parameter in parameters:
        if parameter.grad is not None and bool(entries_of(parameter.grad).any()):
            return parameter
    return None


def parameters_of(optimizer: Optimizer) -> Iterator[Parameter]:
    """Yield all parameters of an optimizer."""
    for group in optimizer.param_groups:
        yield from group["params"]


def parameters_by_size(optimizer: Optimizer) -> list[Parameter]:
    """Return all parameters of an optimizer, the smallest first."""
    return sorted(parameters_of(optimizer), key=lambda parameter: int(parameter.numel()))


def gradient_norm(parameter: Parameter) -> Tensor:
    """Return the norm of a parameter's gradient, in double precision."""
    assert parameter.grad is not None
    return _norm(entries_of(parameter.grad))


def watched_parameters(
    parameters: Sequence[Parameter], are_all: bool
) -> tuple[list[Parameter], Float[Tensor, " n"]]:
    """Return parameters whose gradients show by which factor all are scaled, and their norms.

    Unless all are wanted, that is the first whose gradient is not zero. On a device it is all of
    them, since looking for one would wait for the device.
    """
    if are_all or any(parameter.device.type != "cpu" for parameter in parameters):
        watched = [parameter for parameter in parameters if parameter.grad is not None]
        return watched, gradient_norms(watched)
    for parameter in parameters:
        norms = gradient_norms([parameter])
        if norms.any():
            return [parameter], norms
    return [], gradient_norms([])


def gradient_norms(parameters: Sequence[Parameter]) -> Float[Tensor, " n"]:
    """Return the norms of the parameters' gradients, in double precision."""
    gradients = [entries_of(p.grad) for p in parameters if p.grad is not None]
    if not gradients:
        return torch.zeros(0, dtype=torch.float64)
    return torch.stack(torch._foreach_norm(gradients, 2, widest_format(gradients[0].device)))


def _norm(values: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(values, dtype=widest_format(values.device))
    return norm


# Clipping by norm scales all gradients by the same factor, up to rounding.
MAX_FACTOR_SPREAD = 1e-2


@dataclass(frozen=True)
class Scaling:
    """How the gradients of a step were scaled between the backward pass and the step.

    Attributes:
        factor: Factor of all gradients, or the nearest one if they have several.
        smallest: The smallest factor of a parameter's gradient.
        largest: The largest.
    """

    factor: float
    smallest: float
    largest: float

    @property
    def is_common(self) -> bool:
        """Whether all gradients have the same factor."""
        return not self.largest - self.smallest > MAX_FACTOR_SPREAD * self.largest


def scaling_between(
    before: Float[Tensor, " n"], after: Float[Tensor, " n"], rows: Sequence[Tensor]
) -> Scaling:
    """Return the factors between the norms of gradients before any scaling and now.

    They are 0 if no parameter had a gradient, although the rows do not cancel: the gradient was
    zeroed after the backward pass, as some trainings do where it is not finite.
    """
    # NaN is not zero: such a gradient may be zeroed before the step.
    pairs = [each for each in zip(before.tolist(), after.tolist(), strict=True) if each[0] != 0]
    factors = [now / norm if now != 0 else 0.0 for norm, now in pairs]
    if not factors:
        factors = [1.0 if _cancel(rows) else 0.0]
    scaling = Scaling(factors[0], min(factors), max(factors))
    if scaling.is_common:
        return scaling
    nearest = sum(norm * now for norm, now in pairs) / sum(norm * norm for norm, _ in pairs)
    return replace(scaling, factor=nearest)


@dataclass(frozen=True)
class ValueClipping:
    """The effect of clipping by value on a gradient.

    Attributes:
        factor: Factor of the multiple of the gradient that is nearest to the clipped gradient.
        cosine: Cosine of the angle between the gradient before and after clipping.
    """

    factor: float
    cosine: float


def value_clipping_of(parameters: Iterable[Parameter], bound: float) -> ValueClipping:
    """Predict the effect of clipping by value on the joint gradient of the parameters."""
    gradients = [p.grad.detach() for p in parameters if p.grad is not None]
    products = [_products(gradient, bound) for gradient in gradients]
    lost, square, square_after = (
        torch.stack(products).sum(dim=0).cpu().tolist() if products else (0,) * 3
    )
    if square == 0:
        return ValueClipping(factor=1.0, cosine=1.0)
    # Computed from the clipped-off part, which is exactly zero where nothing is clipped.
    factor = 1 - lost / square
    return ValueClipping(factor, factor * (square / square_after) ** 0.5)


def _products(gradient: Tensor, bound: float) -> Float[Tensor, 3]:
    gradient = gradient.flatten().to(widest_format(gradient.device))
    clipped = gradient.clamp(-bound, bound)
    return torch.stack([(gradient - clipped) @ gradient, gradient @ gradient, clipped @ clipped])


class GradientScale:
    """Measures the factor by which the gradients of a step were scaled since the backward pass.

    Clipping by norm scales all gradients alike, so the norms of some parameters' gradients show
    it. ``factor_before`` is the factor that ``norms`` already contain.
    """

    def __init__(self, parameters: Sequence[Parameter], norms: Float[Tensor, " n"]) -> None:
        self._parameters, self._norms = parameters, norms
        self.factor_before = 1.0
        self._settled: tuple[Tensor, Tensor] | None = None

    def settle(self) -> None:
        """Measure the norms for good: from now on, the optimizer may change gradients itself."""
        self._settled = self.norms()

    def norms(self) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"]]:
        """Return the norms before any scaling and now, without waiting for the device."""
        if self._settled is not None:
            return self._settled
        if any(parameter.grad is None for parameter in self._parameters):
            return torch.ones_like(self._norms), torch.ones_like(self._norms)
        return self._norms, gradient_norms(self._parameters)

    def factor(self) -> float:
        """Return the factor up to now."""
        before, after = self.norms()
        return self.factor_before * scaling_between(before.cpu(), after.cpu(), []).factor

    def before_value_clipping(self, parameters: Iterable[Parameter], bound: float) -> ValueClipping:
        """Account for clipping by value that is about to happen, and return its effect."""
        clipping = value_clipping_of(parameters, bound)
        self.factor_before = self.factor() * clipping.factor
        norms = [clipped_norm(parameter, bound) for parameter in self._parameters]
        self._norms = torch.stack(norms) if norms else self._norms
        return clipping


def _cancel(rows: Sequence[Tensor]) -> bool:
    total = sum(float(part.sum(dim=0).norm()) for part in rows)
    size = sum(float(part.norm()) for part in rows)
    return total <= 1e-3 * size  # False for NaN


def clipped_norm(parameter: Parameter, bound: float) -> Tensor:
    """Return the norm that a parameter's gradient will have after clipping by value."""
    assert parameter.grad is not None
    return _norm(parameter.grad.clamp(-bound, bound))
