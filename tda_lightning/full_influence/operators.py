"""Operators: symmetric matrices that are given by their products with vectors.

They are derived from others: damped, averaged over points, or with checked products.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tda_lightning.full_influence.checks import require_definite, require_finite
from tda_lightning.full_influence.objective import LinearizationPoint, Objective
from tda_lightning.full_influence.second_derivatives import differentiation_errors, original_loss

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
    """An operator that is defined by a product; its shape is that of another operator."""

    def __init__(self, like: Operator, product: Callable[[Tensor], Tensor]) -> None:
        self.shape, self.device, self.dtype = like.shape, like.device, like.dtype
        self._product = product

    def __matmul__(self, vectors: Tensor) -> Tensor:
        is_one = vectors.ndim == 1
        return self._product(vectors[:, None])[:, 0] if is_one else self._product(vectors)


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

    return ProductOperator(operator, product)


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

    return ProductOperator(operator, product)


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

    return ProductOperator(operator, product)


def require_second_derivative(objective: Objective, hessian: Operator) -> None:
    """Check one product with the Hessian against two backward passes."""
    generator = torch.Generator().manual_seed(0)
    vector = torch.randn(hessian.shape[0], generator=generator, dtype=torch.float64)
    vector = vector.to(hessian.device, hessian.dtype)
    expected = torch.zeros_like(vector)
    for number in range(len(objective.batches)):
        expected += _share(objective, number) * _product(objective, number, vector)
    error = float((hessian @ vector - expected).norm() / expected.norm())
    if not error < 1e-3:
        raise ValueError(
            f"torch.func differentiates `{type(objective.model).__name__}.training_step` "
            f"incorrectly: a product with its Hessian differs by {error:.1%} from that of two "
            "backward passes. Use `curvature=GaussNewton()`, which needs first derivatives only."
        )


def _share(objective: Objective, number: int) -> float:
    """Return the share of a batch's loss in the mean loss."""
    size = objective.sizes[number] if objective.reduction == "mean" else 1
    return size / objective.n


def _product(objective: Objective, number: int, vector: Float[Tensor, " d"]) -> Float[Tensor, " d"]:
    """Return the product of a vector with the Hessian of a batch, by two backward passes."""
    parameters = objective.parameters
    with torch.enable_grad():
        loss = original_loss(objective, number)
        first = torch.autograd.grad(loss, parameters, create_graph=True, materialize_grads=True)
        slope = torch.cat([gradient.flatten() for gradient in first]) @ vector
        second = torch.autograd.grad(slope, parameters, materialize_grads=True)
    return torch.cat([gradient.flatten() for gradient in second])
