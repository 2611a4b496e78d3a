"""Operators: symmetric matrices that are given by their products with vectors.

They are derived from others: damped, averaged over points, or with checked products. Checks for
NaN, infinity and negative eigenvalues name the source.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tda_lightning.full_influence.objective import LinearizationPoint, Objective
from tda_lightning.full_influence.second_derivatives import differentiation_errors

# Largest rounding error of a product, in units of the number format's precision.
_MAX_ROUNDING = 1000


@runtime_checkable
class Operator(Protocol):
    """A symmetric matrix that is given by its products with vectors."""

    @property
    def shape(self) -> tuple[int, int]:
        """Numbers of rows and columns."""

    @property
    def device(self) -> torch.device:
        """Device of the vectors."""

    @property
    def dtype(self) -> torch.dtype:
        """Data type of the vectors."""

    def __matmul__(self, vectors: Tensor) -> Tensor:
        """Return the product with the columns of a matrix."""


class ProductOperator:
    """An operator that is defined by its product, with the device and data type of ``like``."""

    def __init__(
        self, d: int, like: Operator | Tensor, product: Callable[[Tensor], Tensor]
    ) -> None:
        self.shape, self.device, self.dtype = (d, d), like.device, like.dtype
        self._product = product

    def __matmul__(self, vectors: Tensor) -> Tensor:
        is_one = vectors.ndim == 1
        return self._product(vectors[:, None])[:, 0] if is_one else self._product(vectors)


def checked(objective: Objective, multiply: Callable[[Tensor], Tensor]) -> Operator:
    """Return the operator of an objective with a product; errors name the step and its data."""

    def product(vectors: Float[Tensor, "d n"]) -> Float[Tensor, "d n"]:
        with differentiation_errors(objective):
            products = multiply(vectors)
        require_finite(
            products,
            f"A product with the curvature of `{objective.argument}`",
            "Look for NaN or infinity in its samples, and in the weights.",
        )
        return products

    return ProductOperator(objective.d, objective.parameters[0], product)


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

    return ProductOperator(operator.shape[0], operator, product)


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

    return ProductOperator(operator.shape[0], operator, product)


_INDEFINITE = (
    "Increase `damping` until it exceeds the magnitude of every negative eigenvalue, as the "
    "default does. Or use `curvature=GaussNewton()`, which has none."
)


def require_finite(numbers: Tensor, name: str, remedy: str) -> None:
    """Check that all numbers are finite; the message begins with their name, and ends in a remedy.

    >>> require_finite(torch.tensor([1.0, torch.nan]), "The mean", "Look at the samples.")
    Traceback (most recent call last):
        ...
    ValueError: The mean is not finite: 1 of 2 numbers are NaN or infinite. Look at the samples.
    """
    wrong = int((~torch.isfinite(numbers)).sum())
    if wrong:
        raise ValueError(
            f"{name} is not finite: {wrong:,} of {numbers.numel():,} numbers are NaN or infinite. "
            f"{remedy}"
        )


def require_definite(smallest: float, damping: float) -> None:
    """Check that damping outweighs the smallest eigenvalue of a curvature, or a bound above it."""
    if smallest + damping <= 0:
        raise ValueError(
            f"The curvature has an eigenvalue of {smallest:.3g} or less, and damping {damping:.3g} "
            f"does not compensate for it. {_INDEFINITE}"
        )
