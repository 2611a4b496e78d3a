"""Operators: all that is taken from curvlinops and SciPy, said in the words of this library.

This room is entered late, by those who ask for it: both libraries are an extra.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tda_lightning.full_influence.objective import Objective

try:
    with warnings.catch_warnings():
        # A library below compiles with `torch.jit.script`, about which torch warns.
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        import curvlinops
        from curvlinops._torch_base import PyTorchLinearOperator
        from scipy.sparse.linalg import ArpackError, eigsh
except ImportError as error:
    raise ImportError(
        f"Whole gradients need curvlinops and SciPy, and `{error.name}` is not installed. Install "
        "them with `pip install 'tda_lightning[solvers]'`."
    ) from error

# How well the smallest eigenvalue is told from zero, relative to the largest in magnitude.
_PRECISE = 1e-3
Product = Callable[[Float[Tensor, "d n"]], Float[Tensor, "d n"]]


@runtime_checkable
class Operator(Protocol):
    """A symmetric matrix that can be multiplied with."""

    @property
    def shape(self) -> tuple[int, int]:
        """Its numbers of rows and columns."""

    @property
    def device(self) -> torch.device:
        """Where it acts."""

    @property
    def dtype(self) -> torch.dtype:
        """In which number format."""

    def __matmul__(self, vectors: Tensor) -> Tensor:
        """Return the product with the columns of a matrix."""


class _Outputs(nn.Module):
    """What curvlinops takes for a model: batches are known by their numbers."""

    def __init__(self, objective: Objective, read: Callable[[int], Tensor]) -> None:
        super().__init__()
        self.model = objective.model
        self._read = read

    def forward(self, number: Tensor) -> Tensor:
        return self._read(int(number))


class _Loss(nn.Module):
    """What curvlinops takes for a loss function."""

    def __init__(self, reduction: str, judge: Callable[[Tensor, int], Tensor]) -> None:
        super().__init__()
        self.reduction = reduction
        self._judge = judge

    def forward(self, outputs: Tensor, number: Tensor) -> Tensor:
        return self._judge(outputs, int(number))


def gauss_newton(
    objective: Objective, read: Callable[[int], Tensor], judge: Callable[[Tensor, int], Tensor]
) -> Operator:
    """Return the Gauss-Newton matrix of the mean loss.

    Args:
        objective: The model and the data.
        read: From the number of a batch to the model's outputs.
        judge: From outputs and the number of their batch to its loss.
    """
    return _assembled(curvlinops.GGNLinearOperator, objective, read, judge)


def hessian(objective: Objective, read: Callable[[int], Tensor]) -> Operator:
    """Return the Hessian of the mean loss; ``read`` gives that of a batch, from its number."""
    return _assembled(curvlinops.HessianLinearOperator, objective, read, lambda loss, _: loss)


def _assembled(
    kind: Any,
    objective: Objective,
    read: Callable[[int], Tensor],
    judge: Callable[[Tensor, int], Tensor],
) -> Operator:
    numbers = [torch.tensor(number) for number in range(len(objective.batches))]
    operator = kind(
        _Outputs(objective, read),
        _Loss(objective.reduction, judge),
        list(objective.parameters),
        list(zip(numbers, numbers, strict=True)),
        num_data=objective.n,
        batch_size_fn=lambda number: objective.sizes[int(number)],
        # The data are kept, the model is in evaluation mode: there is nothing to check.
        check_deterministic=False,
    )
    mean: Operator = operator * objective.share
    return mean


def kronecker_factored(
    objective: Objective,
    read: Callable[[int], Tensor],
    loss: nn.Module,
    labels: Sequence[Tensor],
    fisher: Literal["type-2", "mc"],
) -> Operator:
    """Return EKFAC's approximation of the Gauss-Newton matrix of the mean of a loss.

    Args:
        objective: The model and the data.
        read: From the number of a batch to the model's outputs.
        loss: One of torch's loss functions that curvlinops knows; its reduction is a mean.
        labels: The labels of each batch.
        fisher: Whether the expectation over labels is taken, or a sample of it.
    """
    numbers = [torch.tensor(number) for number in range(len(objective.batches))]
    operator: Operator = curvlinops.EKFACLinearOperator(
        _Outputs(objective, read),
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


class _Composed(PyTorchLinearOperator):  # type: ignore[misc]
    """A symmetric operator, by what it does to the columns of a matrix."""

    SELF_ADJOINT = True

    def __init__(self, like: Any, product: Product) -> None:
        whole = [(like.shape[0],)]  # where parameters are not told apart
        super().__init__(getattr(like, "_in_shape", whole), getattr(like, "_out_shape", whole))
        self._like, self._product = like, product

    @property
    def device(self) -> torch.device:
        device: torch.device = self._like.device
        return device

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = self._like.dtype
        return dtype

    def _matmat(self, vectors: list[Tensor]) -> list[Tensor]:
        products = self._product(torch.cat([one.flatten(end_dim=-2) for one in vectors]))
        parts = torch.split(products, self._in_shape_flat)
        return [part.reshape(one.shape) for part, one in zip(parts, vectors, strict=True)]


def composed(like: Operator, product: Product) -> Operator:
    """Return a symmetric operator of the shape of another.

    Args:
        like: The other.
        product: Multiplies with the columns of a matrix.
    """
    return _Composed(like, product)


def conjugate_gradient(
    operator: Operator, vectors: Float[Tensor, "d n"], tolerance: float, products: int
) -> Float[Tensor, "d n"]:
    """Solve for the columns of a matrix, to a residual, or after so many products, however far."""
    # The mean residual is what is judged; divided by their number, no vector's is above.
    limit = tolerance / vectors.shape[1]
    inverse = curvlinops.CGInverseLinearOperator(
        operator,
        tolerance=limit,
        stop_updating_after=limit,
        eps=torch.finfo(vectors.dtype).tiny,
        max_iter=products,
        max_tridiag_iter=0,
    )
    with warnings.catch_warnings():
        # Whether it has arrived is for the caller to judge, by the residual itself.
        warnings.filterwarnings("ignore", message="CG terminated")
        solved: Tensor = inverse @ vectors
    return solved


def neumann(
    operator: Operator, vectors: Float[Tensor, "d n"], terms: int, scale: float
) -> Float[Tensor, "d n"]:
    """Sum so many terms of the Neumann series of the inverse of ``scale`` times the operator."""
    inverse = curvlinops.NeumannInverseLinearOperator(
        operator, num_terms=terms, scale=scale, check_nan=False
    )
    solved: Tensor = inverse @ vectors
    return solved


def kronecker_inverse(operator: Operator, damping: float) -> Operator:
    """Return the inverse of EKFAC's approximation plus a multiple of the identity."""
    inverse: Operator = curvlinops.KFACInverseLinearOperator(
        operator, damping=damping, use_exact_damping=True
    )
    return inverse


def eigenpairs(
    operator: Operator, rank: int, tolerance: float = 0.0
) -> tuple[Float[Tensor, " r"], Float[Tensor, "d r"]]:
    """Return the eigenvalues largest in magnitude and their eigenvectors; ``rank`` of them, or all.

    Args:
        operator: The matrix.
        rank: How many.
        tolerance: How far off the eigenvalues may be, relative to themselves.

    Raises:
        ValueError: If the iteration does not arrive.
    """
    d = operator.shape[0]
    if rank >= d - 1:
        whole = operator @ torch.eye(d, device=operator.device, dtype=operator.dtype)
        values, vectors = torch.linalg.eigh(0.5 * (whole + whole.mT))
        return values, vectors
    start = torch.randn(d, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    # More than the products are precise to would not be found.
    tolerance = max(tolerance, torch.finfo(operator.dtype).eps)
    multiplied = composed(operator, lambda vectors: operator @ vectors).to_scipy()  # type: ignore[attr-defined]
    try:
        found = eigsh(multiplied, k=rank, which="LM", v0=start.numpy(), tol=tolerance)
    except ArpackError as error:
        if not (operator @ start.to(operator.device, operator.dtype)).any():
            zeros = torch.zeros(rank, device=operator.device, dtype=operator.dtype)
            return zeros, torch.eye(d, rank, device=operator.device, dtype=operator.dtype)
        raise ValueError(
            f"The largest eigenvalues of the curvature, {rank} of them, were not found: {error}. "
            "Ask for fewer, or take another solver: `ConjugateGradient()`."
        ) from error
    values, vectors = (torch.as_tensor(one).to(operator.device, operator.dtype) for one in found)
    return values, vectors


def extremes(operator: Operator) -> tuple[float, float]:
    """Return the smallest eigenvalue, at most 0, and the magnitude of the largest in magnitude.

    The first is on the safe side, below the true one by 0.4 % of the second at most; and 0 where it
    is next to zero, by 0.2 %.
    """
    size = float(eigenpairs(operator, 1)[0].abs().max())
    # What is smallest is largest in magnitude once all are moved below zero.
    moved = composed(operator, lambda vectors: operator @ vectors - size * vectors)
    lowest = size + float(eigenpairs(moved, 1, _PRECISE)[0].min())
    slack = 2 * _PRECISE * size
    return (lowest - slack if lowest < -slack else 0.0), size


def kronecker_mean_eigenvalue(operator: Any) -> float:
    """Return the mean eigenvalue of EKFAC's approximation."""
    trace = float(operator.trace)
    size: int = operator.shape[0]
    return trace / size
