"""Bindings to curvlinops and SciPy: linear operators and eigenvalues.

Both libraries are optional dependencies, so import this file only where it is used.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from tda_lightning.full_influence.objective import Objective
from tda_lightning.full_influence.operators import Operator, ProductOperator

try:
    with warnings.catch_warnings():
        # A dependency uses `torch.jit.script`, which torch has deprecated.
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        import curvlinops
        from scipy.sparse.linalg import ArpackError, LinearOperator, eigsh
except ImportError as error:
    raise ImportError(
        f"This solver needs curvlinops and SciPy, and `{error.name}` is not installed. Install "
        "them with `pip install 'tda_lightning[solvers]'`."
    ) from error

# Tolerance of the smallest eigenvalue, relative to the largest in magnitude.
_EIGENVALUE_TOLERANCE = 1e-3


class _Outputs(nn.Module):
    """Presents the model to curvlinops as a module whose inputs are the numbers of batches."""

    def __init__(self, objective: Objective, outputs_of: Callable[[int], Tensor]) -> None:
        super().__init__()
        self.model = objective.model
        self._outputs_of = outputs_of

    def forward(self, number: Tensor) -> Tensor:
        return self._outputs_of(int(number))


class _Loss(nn.Module):
    """Presents the loss to curvlinops as a module whose labels are the numbers of batches."""

    def __init__(self, reduction: str, loss_of: Callable[[Tensor, int], Tensor]) -> None:
        super().__init__()
        self.reduction = reduction
        self._loss_of = loss_of

    def forward(self, outputs: Tensor, number: Tensor) -> Tensor:
        return self._loss_of(outputs, int(number))


def gauss_newton(
    objective: Objective,
    outputs_of: Callable[[int], Tensor],
    loss_of: Callable[[Tensor, int], Tensor],
) -> Operator:
    """Return the Gauss-Newton matrix of the mean loss.

    ``outputs_of`` takes the number of a batch; ``loss_of`` takes outputs and that number.
    """
    return _curvature(curvlinops.GGNLinearOperator, objective, outputs_of, loss_of)


def hessian(objective: Objective, loss_of: Callable[[int], Tensor]) -> Operator:
    """Return the Hessian of the mean loss; ``loss_of`` takes the number of a batch."""
    kind = curvlinops.HessianLinearOperator
    return _curvature(kind, objective, loss_of, lambda loss, number: loss)


def _curvature(
    kind: Any,
    objective: Objective,
    outputs_of: Callable[[int], Tensor],
    loss_of: Callable[[Tensor, int], Tensor],
) -> Operator:
    numbers = [torch.tensor(number) for number in range(len(objective.batches))]
    operator = kind(
        _Outputs(objective, outputs_of),
        _Loss(objective.reduction, loss_of),
        list(objective.parameters),
        list(zip(numbers, numbers, strict=True)),
        num_data=objective.n,
        batch_size_fn=lambda number: objective.sizes[int(number)],
        # The batches are fixed and the model is in evaluation mode: there is nothing to check.
        check_deterministic=False,
    )
    mean: Operator = operator * objective.mean_factor
    return mean


def kronecker_factored(
    objective: Objective,
    outputs_of: Callable[[int], Tensor],
    loss: nn.Module,
    labels: Sequence[Tensor],
    fisher: Literal["type-2", "mc"],
) -> Operator:
    """Return EKFAC's approximation of the Gauss-Newton matrix of the mean of a loss.

    ``outputs_of`` takes the number of a batch. The loss is one of torch's that curvlinops supports,
    with mean reduction. ``"type-2"`` takes the expectation over labels, ``"mc"`` samples them.
    """
    numbers = [torch.tensor(number) for number in range(len(objective.batches))]
    operator: Operator = curvlinops.EKFACLinearOperator(
        _Outputs(objective, outputs_of),
        loss,
        list(objective.parameters),
        list(zip(numbers, labels, strict=True)),
        fisher_type=fisher,
        separate_weight_and_bias=False,
        num_data=objective.n,
        num_per_example_loss_terms=1,
        batch_size_fn=lambda number: objective.sizes[int(number)],
        check_deterministic=False,
    )
    return operator


def kronecker_inverse(operator: Operator, damping: float) -> Operator:
    """Return the inverse of EKFAC's approximation plus a multiple of the identity."""
    inverse: Operator = curvlinops.KFACInverseLinearOperator(
        operator, damping=damping, use_exact_damping=True
    )
    return inverse


def eigenpairs(
    operator: Operator, rank: int, tolerance: float = 0.0
) -> tuple[Float[Tensor, " r"], Float[Tensor, "d r"]]:
    """Return the ``rank`` eigenvalues of largest magnitude and their eigenvectors, or all.

    The relative error of the eigenvalues is at most ``tolerance``.

    Raises:
        ValueError: If the iteration does not converge.
    """
    d = operator.shape[0]
    if rank >= d - 1:
        matrix = operator @ torch.eye(d, device=operator.device, dtype=operator.dtype)
        values, vectors = torch.linalg.eigh(0.5 * (matrix + matrix.mT))
        return values, vectors

    def product(vector: np.ndarray) -> np.ndarray:
        column = torch.from_numpy(vector).to(operator.device, operator.dtype).reshape(-1, 1)
        image: np.ndarray = (operator @ column)[:, 0].cpu().numpy()
        return image

    start = torch.randn(d, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    # A tolerance below the precision of the products could not be reached.
    tolerance = max(tolerance, torch.finfo(operator.dtype).eps)
    dtype = torch.empty(0, dtype=operator.dtype).numpy().dtype
    linear_operator = LinearOperator(operator.shape, matvec=product, dtype=dtype)
    try:
        arrays = eigsh(linear_operator, k=rank, which="LM", v0=start.numpy(), tol=tolerance)
    except ArpackError as error:
        if not (operator @ start.to(operator.device, operator.dtype)).any():
            zeros = torch.zeros(rank, device=operator.device, dtype=operator.dtype)
            return zeros, torch.eye(d, rank, device=operator.device, dtype=operator.dtype)
        raise ValueError(
            f"The {rank} largest eigenvalues of the curvature were not found: {error}. Request "
            "fewer, or use another solver: `ConjugateGradient()`."
        ) from error
    values, vectors = (torch.as_tensor(a).to(operator.device, operator.dtype) for a in arrays)
    return values, vectors


def extremes(operator: Operator) -> tuple[float, float]:
    """Return the smallest eigenvalue, at most 0, and the largest magnitude of an eigenvalue.

    The first is a lower bound, at most 0.4 % of the second below the true value. It is 0 if it is
    zero to within 0.2 % of the second.
    """
    size = float(eigenpairs(operator, 1)[0].abs().max())
    # With all eigenvalues shifted below zero, the smallest one has the largest magnitude.
    shifted = ProductOperator(operator, lambda vectors: operator @ vectors - size * vectors)
    lowest = size + float(eigenpairs(shifted, 1, _EIGENVALUE_TOLERANCE)[0].min())
    slack = 2 * _EIGENVALUE_TOLERANCE * size
    return (lowest - slack if lowest < -slack else 0.0), size
