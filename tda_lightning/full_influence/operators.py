"""Operators derived from other operators: damped, averaged, or with checked products.

This file imports curvlinops, so import it only where it is used.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tda_lightning.full_influence.checks import require_definite, require_finite
from tda_lightning.full_influence.curvlinops_bindings import Operator, from_product
from tda_lightning.full_influence.objective import LinearizationPoint, Objective
from tda_lightning.full_influence.second_derivatives import differentiation_errors

# Largest rounding error of a product, in units of the number format's precision.
_MAX_ROUNDING = 1000


def checked(operator: Operator, objective: Objective) -> Operator:
    """Return the same operator, with errors that name the training step and its data."""

    def product(vectors: Float[Tensor, "d n"]) -> Float[Tensor, "d n"]:
        with differentiation_errors(objective):
            products = operator @ vectors
        require_finite(
            products,
            f"A product with the curvature of `{objective.argument}`",
            "Look for NaN or infinity in its samples, and in the weights.",
        )
        return products

    return from_product(operator, product)


def mean_over_points(
    operator: Operator, model: nn.Module, linearization_points: Sequence[LinearizationPoint]
) -> Operator:
    """Return the mean of an operator over several points, each in the point's coordinates."""

    def product(vectors: Float[Tensor, "d n"]) -> Float[Tensor, "d n"]:
        total = torch.zeros_like(vectors)
        for point in linearization_points:
            scale = 1.0 if point.scale is None else point.scale[:, None]
            with point.loaded_into(model):
                total += scale * (operator @ (scale * vectors))
        return total / len(linearization_points)

    return from_product(operator, product)


def damped_definite(operator: Operator, damping: float) -> Operator:
    """Return the operator plus a multiple of the identity; products check that it is definite.

    Iterations reach negative eigenvalues, if there are any, after a few products. From then on they
    would not converge.
    """
    size = 0.0

    def product(vectors: Float[Tensor, "d n"]) -> Float[Tensor, "d n"]:
        nonlocal size
        products, precision = operator @ vectors + damping * vectors, torch.finfo(vectors.dtype)
        norms = vectors.norm(dim=0).clamp_min(precision.tiny)
        units, images = vectors / norms, products / norms
        size = max(size, float(images.norm(dim=0).max()))
        least = float((units * images).sum(dim=0).min())
        # A slightly negative value may be a rounding error.
        if least < -_MAX_ROUNDING * precision.eps * size:
            require_definite(least - damping, damping)
        return products

    return from_product(operator, product)
