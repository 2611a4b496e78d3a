"""Linear algebra on matrices whose rows are gradients."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from tda_lightning.stores.precision import in_double_precision

# Rows of a symmetric matrix that are computed at once. Smaller products would be slower.
_STRIP = 256


def unit_rows(rows: Float[Tensor, "n k"]) -> Float[Tensor, "n k"]:
    """Scale every row to unit length, without underflow or overflow; rows of zeros stay zeros.

    >>> import torch
    >>> unit_rows(torch.tensor([[3.0, 4.0], [0.0, 0.0]]))
    tensor([[0.6000, 0.8000],
            [0.0000, 0.0000]])
    """
    largest = rows.abs().amax(dim=1, keepdim=True)
    # Squares of small numbers underflow, and those of large ones overflow.
    scaled = rows / torch.where(largest > 0, largest, 1)
    lengths: Tensor = scaled.norm(dim=1, keepdim=True)  # at least 1, except for zeros
    return scaled / lengths.clamp_min(1)


class SumOfOuterProducts:
    """The sum of the outer products of rows, a symmetric matrix of which only half is computed.

    >>> import torch
    >>> products = SumOfOuterProducts()
    >>> products.add(torch.tensor([[1.0, 2.0]]))
    >>> products.add(torch.tensor([[1.0, 0.0]]), share=3.0)
    >>> products.matrix()
    tensor([[4., 2.],
            [2., 4.]])
    """

    def __init__(self) -> None:
        self._sum = torch.zeros(())  # Its shape and device are those of the first rows.

    def add(self, rows: Float[Tensor, "m k"], share: float = 1.0) -> None:
        """Add ``share * rows.mT @ rows``."""
        k = rows.shape[1]
        if not self._sum.ndim:
            self._sum = rows.new_zeros(k, k)
        for start in range(0, k, _STRIP):  # strips of the lower triangle
            strip = slice(start, start + _STRIP)
            products = self._sum[strip, : strip.stop]
            products.addmm_(rows[:, strip].mT, rows[:, : strip.stop], alpha=share)

    def matrix(self) -> Float[Tensor, "k k"]:
        """Return the sum; nothing may be added afterwards."""
        for start in range(0, len(self._sum) if self._sum.ndim else 0, _STRIP):
            strip = slice(start, start + _STRIP)
            self._sum[:start, strip] = self._sum[strip, :start].mT
        return self._sum


def eigendecomposition(
    matrix: Float[Tensor, "k k"],
) -> tuple[Float[Tensor, " k"], Float[Tensor, "k k"]]:
    """Return the eigenvalues of a symmetric matrix, ascending, and its eigenvectors as columns.

    It is computed in double precision. In single precision, LAPACK fails, or returns NaN, for
    matrices with many rows of almost zeros, such as those of models with dead inputs.

    Raises:
        ValueError: If the matrix is not finite, or if there is no result.

    >>> import torch
    >>> eigendecomposition(torch.tensor([[2.0, 0.0], [0.0, 1.0]]))[0]
    tensor([1., 2.])
    """
    if not matrix.isfinite().all():
        raise ValueError(_explain_failure(matrix, matrix))
    try:
        values, vectors = torch.linalg.eigh(in_double_precision(matrix))
    except RuntimeError as error:  # `LinAlgError` is one.
        raise ValueError(
            f"The eigenvectors of the {len(matrix)} x {len(matrix)} curvature matrix were not "
            f"found: {error} Expected a result in double precision. Record with a smaller "
            "projector, or use another method."
        ) from error
    return values.to(matrix), vectors.to(matrix)


def is_lost_in_rounding(damping: float, gramian: Float[Tensor, "k k"]) -> bool:
    """Return whether rounding errors of a matrix are larger than a hundredth of its damping.

    Then the inverse of the damped matrix is wrong, or does not exist, in the matrix' precision.
    """
    rounding = torch.finfo(gramian.dtype).eps * float(gramian.diagonal().sum())
    return gramian.dtype != torch.float64 and rounding > 0.01 * damping


def damped_root(gramian: Float[Tensor, "k k"], damping: float) -> Float[Tensor, "k k"]:
    """Return the lower Cholesky factor of ``gramian + damping * I``.

    Args:
        gramian: Positive semi-definite matrix; it is not modified.
        damping: Added to the diagonal. Larger values are safer but less accurate.

    Raises:
        ValueError: If the sum is not positive definite, or not finite.

    >>> import torch
    >>> damped_root(torch.tensor([[3.0, 0.0], [0.0, 0.0]]), 1.0)
    tensor([[2., 0.],
            [0., 1.]])
    """
    damped = gramian.clone()
    damped.diagonal().add_(damping)
    root: Tensor
    root, failed = torch.linalg.cholesky_ex(damped)
    if failed or not root.diagonal().isfinite().all():
        raise ValueError(_explain_failure(gramian, damped))
    return root


def conjugate_gradient(
    product: Callable[[Tensor], Tensor],
    vectors: Float[Tensor, "d n"],
    tolerance: float,
    max_products: int,
) -> Float[Tensor, "d n"]:
    """Solve a positive definite linear system for each column, by conjugate gradients.

    It ends when no residual is larger than ``tolerance`` times its right-hand side, or after
    ``max_products``; whether it has converged is not checked.

    >>> import torch
    >>> matrix = torch.tensor([[2.0, 1.0], [1.0, 3.0]])
    >>> conjugate_gradient(matrix.matmul, torch.tensor([[3.0], [4.0]]), 1e-6, 2)
    tensor([[1.0000],
            [1.0000]])
    """
    norms = vectors.norm(dim=0).clamp_min(torch.finfo(vectors.dtype).tiny)
    residuals = vectors / norms  # Squares of small numbers would underflow.
    solutions, directions = torch.zeros_like(vectors), residuals.clone()
    squares = residuals.square().sum(dim=0)
    for _ in range(max_products):
        is_open = squares > tolerance**2
        if not is_open.any():
            break
        products = product(directions)
        lengths = torch.where(is_open, squares / (directions * products).sum(dim=0), 0)
        solutions += lengths * directions
        residuals -= lengths * products
        previous, squares = squares, residuals.square().sum(dim=0)
        directions = residuals + torch.where(is_open, squares / previous, 0) * directions
    return solutions.mul_(norms)


def _explain_failure(gramian: Float[Tensor, "k k"], damped: Float[Tensor, "k k"]) -> str:
    """Return the reason why there is no Cholesky factor.

    It does not quote the damping, which users may have passed in other units.
    """
    size = f"{len(gramian)} x {len(gramian)}"
    if not gramian.isfinite().all():
        return (
            f"The {size} curvature matrix holds NaN or infinity; expected finite numbers. Look for "
            "a training that diverged, or for samples whose gradients are not finite, or too large "
            "to be squared."
        )
    if not damped.diagonal().isfinite().all():
        return (
            f"The damping of the {size} curvature matrix is not finite; expected a finite "
            "`damping`."
        )
    if not damped.any():
        return (
            f"The {size} curvature matrix is zero; expected samples whose gradients are not all "
            "zero."
        )
    return (
        f"The damped {size} curvature matrix is not positive definite; expected an invertible one. "
        "Increase `damping`."
    )
