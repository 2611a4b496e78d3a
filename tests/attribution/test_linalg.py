"""Functions on matrices: for numbers of any size, and clear where there is no answer."""

import math

import pytest
import torch

from tda_lightning.attribution.linalg import damped_root, unit_rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [1e-37, 1e-25, 1.0, 1e25, 1e38])
def test_unit_rows_have_length_one_however_long_the_rows_are(size, dtype):
    rows = torch.tensor([[0.6, -0.8, 0.0], [1.0, 0.0, 0.0]], dtype=dtype)
    expected = rows / rows.norm(dim=1, keepdim=True)
    torch.testing.assert_close(unit_rows(size * rows), expected)


def test_unit_rows_of_zeros_are_zeros():
    assert torch.equal(unit_rows(torch.zeros(3, 5)), torch.zeros(3, 5))
    assert unit_rows(torch.zeros(0, 5)).shape == (0, 5)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("place", [(0, 0), (2, 2), (2, 0)], ids=str)
def test_a_matrix_that_is_not_finite_is_called_so_and_no_damping_is_blamed(bad, place):
    matrix = torch.eye(3)
    matrix[place] = matrix[place[::-1]] = bad
    with pytest.raises(ValueError, match="holds NaN or infinity; expected finite") as said:
        damped_root(matrix, 1.25)
    assert "damping" not in str(said.value)


def test_a_matrix_without_an_inverse_is_told_apart_from_no_gradients_and_no_damping():
    matrix = torch.diag(torch.tensor([1.0, 2.0, -0.5]))
    with pytest.raises(
        ValueError, match=r"3 x 3 matrix.*without an inverse; expected more"
    ) as said:
        damped_root(matrix, 0.478803)
    assert "0.478" not in str(said.value)  # users may have given it in other units
    with pytest.raises(ValueError, match="is zero; expected samples whose gradients are not"):
        damped_root(torch.zeros(3, 3), 0.0)
    with pytest.raises(ValueError, match="expected a finite `damping`"):
        damped_root(torch.eye(3), math.inf)
