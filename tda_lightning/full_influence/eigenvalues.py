"""Eigenvalues of operators, by SciPy, an optional dependency: import this file on first use."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from tda_lightning.full_influence.operators import Operator, ProductOperator

try:
    from scipy.sparse.linalg import ArpackError, LinearOperator, eigsh
except ImportError as error:
    raise ImportError(
        f"This solver needs SciPy, and `{error.name}` is not installed. Install it with "
        "`pip install 'tda_lightning[solvers]'`."
    ) from error

# Tolerance of the smallest eigenvalue, relative to the largest in magnitude.
_EIGENVALUE_TOLERANCE = 1e-3


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
    d, shift = operator.shape[0], lambda vectors: operator @ vectors - size * vectors
    shifted = ProductOperator(d, operator, shift)
    lowest = size + float(eigenpairs(shifted, 1, _EIGENVALUE_TOLERANCE)[0].min())
    slack = 2 * _EIGENVALUE_TOLERANCE * size
    return (lowest - slack if lowest < -slack else 0.0), size
