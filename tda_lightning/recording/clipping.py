r"""Clipping by value: it bends a gradient, which rows can only follow by the nearest factor.

An elementwise bound is no multiple of the gradient :math:`g`, so no factor that all samples have in
common leads to what is left of it. The multiple that comes nearest has the factor

.. math:: c = \langle \mathrm{clip}(g), \, g \rangle \; / \; \langle g, \, g \rangle

which is 1 where nothing was clipped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from tda_lightning.recording.optimizer_gradients import clip_coefficient

_Watcher = Callable[[int, Optimizer, float], None]


@dataclass(frozen=True)
class ValueClipping:
    """What clipping by value makes of a gradient.

    Attributes:
        factor: The multiple of the gradient that is nearest to what is left of it.
        cosine: Cosine of the angle between the two.
    """

    factor: float
    cosine: float


def value_clipping_of(parameters: Iterable[Parameter], bound: float) -> ValueClipping:
    """Say what clipping by value is going to make of the parameters' gradients, taken together."""
    gradients = [one.grad.detach() for one in parameters if one.grad is not None]
    products = [_products(one.flatten().double(), bound) for one in gradients]
    lost, square, square_after = torch.stack(products).sum(dim=0).tolist() if products else (0,) * 3
    if square == 0:
        return ValueClipping(factor=1.0, cosine=1.0)
    # From what is lost, since that is zero to the last bit where nothing is.
    factor = 1 - lost / square
    return ValueClipping(factor, factor * (square / square_after) ** 0.5)


def _products(before: Float[Tensor, " n"], bound: float) -> Tensor:
    after = before.clamp(-bound, bound)
    return torch.stack([(before - after) @ before, before @ before, after @ after])


class GradientScale:
    """Follows by how much the gradients of a step have been scaled since their backward pass.

    Args:
        probe: One of the parameters, unless none has a gradient; clipping by norm scales all alike.
        norm: The norm of its gradient, before anything was scaled.
    """

    def __init__(self, probe: Parameter | None, norm: Tensor | None) -> None:
        self._probe, self._norm = probe, norm
        self._before = 1.0

    def factor(self) -> float:
        """Return the factor up to now."""
        return self._before * float(clip_coefficient(self._probe, self._norm))

    def bend(self, parameters: Iterable[Parameter], bound: float) -> ValueClipping:
        """Take in that gradients are about to be clipped by value; return what that does to these.

        Args:
            parameters: Those that the factor is for.
            bound: Largest absolute value to be left.
        """
        bend = value_clipping_of(parameters, bound)
        self._before = self.factor() * bend.factor
        if self._probe is not None:
            self._norm = norm_after(self._probe, bound)
        return bend


def norm_after(parameter: Parameter, bound: float) -> Tensor:
    """Return the norm that clipping by value is going to leave of a parameter's gradient."""
    assert parameter.grad is not None
    left = parameter.grad.clamp(-bound, bound)
    norm: Tensor = torch.linalg.vector_norm(left, dtype=torch.float64)
    return norm
