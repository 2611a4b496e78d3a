"""Functions on matrices: numbers of any size, and clear errors."""

import math

import pytest
import torch

from tda_lightning.attribution.dynamics.propagator import fast_eigendecomposition
from tda_lightning.attribution.linalg import (
    SumOfOuterProducts,
    damped_root,
    eigendecomposition,
    unit_rows,
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [1e-37, 1e-25, 1.0, 1e25, 1e38])
def test_rows_of_any_size_are_scaled_to_unit_length(size, dtype):
    rows = torch.tensor([[0.6, -0.8, 0.0], [1.0, 0.0, 0.0]], dtype=dtype)
    expected = rows / rows.norm(dim=1, keepdim=True)
    torch.testing.assert_close(unit_rows(size * rows), expected)


def test_unit_rows_of_zeros_are_zeros():
    assert torch.equal(unit_rows(torch.zeros(3, 5)), torch.zeros(3, 5))
    assert unit_rows(torch.zeros(0, 5)).shape == (0, 5)


@pytest.mark.parametrize("k", [5, 256, 257, 601])
def test_sums_of_outer_products_are_those_of_whole_matrices(k):
    generator = torch.Generator().manual_seed(k)
    products, expected = SumOfOuterProducts(), torch.zeros(k, k, dtype=torch.float64)
    for m, share in ((7, 1.0), (0, 2.0), (11, 0.5)):
        rows = torch.randn(m, k, generator=generator, dtype=torch.float64)
        products.add(rows, share)
        expected += share * rows.mT @ rows
    matrix = products.matrix()
    torch.testing.assert_close(matrix, expected)
    torch.testing.assert_close(matrix, matrix.mT)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("place", [(0, 0), (2, 2), (2, 0)], ids=str)
def test_the_error_for_a_matrix_that_is_not_finite_does_not_mention_damping(bad, place):
    matrix = torch.eye(3)
    matrix[place] = matrix[place[::-1]] = bad
    with pytest.raises(ValueError, match="holds NaN or infinity; expected finite") as error:
        damped_root(matrix, 1.25)
    assert "damping" not in str(error.value)


def test_errors_for_singular_and_zero_matrices_and_infinite_damping_differ():
    matrix = torch.diag(torch.tensor([1.0, 2.0, -0.5]))
    with pytest.raises(
        ValueError, match=r"damped 3 x 3 curvature matrix is not positive definite; expected an inv"
    ) as error:
        damped_root(matrix, 0.478803)
    assert "0.478" not in str(error.value)  # users may have passed it in other units
    with pytest.raises(ValueError, match="is zero; expected samples whose gradients are not"):
        damped_root(torch.zeros(3, 3), 0.0)
    with pytest.raises(ValueError, match="expected a finite `damping`"):
        damped_root(torch.eye(3), math.inf)


EIGH = torch.linalg.eigh


def failing(matrix):
    """Fail in single precision, as LAPACK does for some matrices with many rows of zeros."""
    if matrix.dtype == torch.float32:
        raise torch.linalg.LinAlgError("The algorithm failed to converge")
    return EIGH(matrix)


def returning_nan(matrix):
    values, vectors = EIGH(matrix)
    return (values, vectors) if matrix.dtype == torch.float64 else (values, vectors * math.nan)


@pytest.mark.parametrize("decomposition", [eigendecomposition, fast_eigendecomposition])
@pytest.mark.parametrize("eigh", [EIGH, failing, returning_nan])
def test_eigenvectors_are_found_where_single_precision_fails(monkeypatch, decomposition, eigh):
    rows = torch.randn(7, 5, generator=torch.Generator().manual_seed(0))
    matrix = rows @ rows.mT
    monkeypatch.setattr(torch.linalg, "eigh", eigh)
    values, vectors = decomposition(matrix)
    assert values.dtype == vectors.dtype == torch.float32
    torch.testing.assert_close(vectors * values @ vectors.mT, matrix, atol=1e-4, rtol=1e-4)


def test_a_matrix_without_eigenvectors_raises_with_a_remedy(monkeypatch):
    def fail(matrix):
        raise torch.linalg.LinAlgError("no convergence")

    monkeypatch.setattr(torch.linalg, "eigh", fail)
    with pytest.raises(ValueError, match=r"7 x 7 curvature matrix .* no convergence .*smaller"):
        fast_eigendecomposition(torch.eye(7))
    with pytest.raises(ValueError, match="holds NaN or infinity"):
        eigendecomposition(torch.full((3, 3), math.nan))
