"""Composed: operators made of another one.

Like the room of curvlinops, which it needs, this one is entered late.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tda_lightning.full_influence.checks import require_definite, require_finite
from tda_lightning.full_influence.curvlinops_bindings import Operator, composed
from tda_lightning.full_influence.objective import LinearizationPoint, Objective
from tda_lightning.full_influence.second_derivatives import differentiating

# What rounding makes of a product, in units of the number format's precision.
_ROUNDING = 1000


def checked(operator: Operator, objective: Objective) -> Operator:
    """Return the same operator, which says of the step and its data why a product cannot be had."""

    def product(vectors: Float[Tensor, "d n"]) -> Float[Tensor, "d n"]:
        with differentiating(objective):
            found = operator @ vectors
        require_finite(
            found,
            f"A product with the curvature of `{objective.argument}`",
            "Look for NaN or infinity in its samples, and in the weights.",
        )
        return found

    return composed(operator, product)


def seen_from(
    operator: Operator, model: nn.Module, linearization_points: Sequence[LinearizationPoint]
) -> Operator:
    """Return the mean of what an operator is at several weights, each in its own coordinates."""

    def product(vectors: Float[Tensor, "d n"]) -> Float[Tensor, "d n"]:
        total = torch.zeros_like(vectors)
        for viewpoint in linearization_points:
            scale = 1.0 if viewpoint.scale is None else viewpoint.scale[:, None]
            with viewpoint.of(model):
                total += scale * (operator @ (scale * vectors))
        return total / len(linearization_points)

    return composed(operator, product)


def damped(operator: Operator, damping: float) -> Operator:
    """Return the operator plus a multiple of the identity."""
    return composed(operator, lambda vectors: operator @ vectors + damping * vectors)


def definite(operator: Operator, damping: float) -> Operator:
    """Return the operator plus a multiple of the identity, which has to be positive definite.

    Iterations come to negative eigenvalues, if there are any, after a few products: from then on
    they would lead nowhere.
    """
    whole, size = damped(operator, damping), 0.0

    def product(vectors: Float[Tensor, "d n"]) -> Float[Tensor, "d n"]:
        nonlocal size
        found, precision = whole @ vectors, torch.finfo(vectors.dtype)
        norms = vectors.norm(dim=0).clamp_min(precision.tiny)
        units, images = vectors / norms, found / norms
        size = max(size, float(images.norm(dim=0).max()))
        least = float((units * images).sum(dim=0).min())
        # Where the curvature is next to zero, what is left of it may be rounding.
        if least < -_ROUNDING * precision.eps * size:
            require_definite(least - damping, damping)
        return found

    return composed(operator, product)
