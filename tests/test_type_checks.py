"""The tests check types and shapes at run time: a wrong value of any kind raises an error."""

from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
import type_checks
from beartype import beartype
from jaxtyping import Float
from torch import Tensor
from unchecked_calls import type_checks_disabled

import tda_lightning
from tda_lightning.attribution.linalg import damped_root

jaxtyped = type_checks.jaxtyped(typechecker=beartype)


@jaxtyped
def product(
    left: Float[Tensor, "n k"], right: Float[Tensor, "k m"], columns: int
) -> Float[Tensor, "n m"]:
    return (left @ right)[:, :columns]


@jaxtyped
def spelled(number: int, *, word: str = "") -> str:
    return word or number


@jaxtyped
def rows(matrix: Float[Tensor, "n n"]) -> Iterator[Float[Tensor, " n"]]:
    yield from matrix


@jaxtyped
@dataclass(frozen=True)
class Pair:
    left: Float[Tensor, " n"]
    right: Float[Tensor, " n"]
    name: str = ""


def nested(number):
    @jaxtyped
    def same_length(vector: Float[Tensor, " n"], other: Float[Tensor, " n"]) -> int:
        return number

    return same_length


def ones(*shape):
    return torch.ones(shape)


CORRECT = {
    "a function": lambda: product(ones(3, 5), ones(5, 7), 7),
    "another": lambda: spelled(3, word="three"),
    "a generator": lambda: list(rows(ones(3, 3))),
    "a dataclass": lambda: Pair(ones(3), ones(3)),
    "a nested function": lambda: nested(3)(ones(3), other=ones(3)),
    "a function of the package": lambda: damped_root(torch.eye(3), 1.0),
}
WRONG = {
    "an argument": lambda: product(ones(3, 5), ones(5, 7), "7"),
    "a shape": lambda: product(ones(3), ones(5, 7), 7),
    "two shapes": lambda: product(ones(3, 5), ones(3, 7), 7),
    "the shape of the result": lambda: product(ones(3, 5), ones(5, 7), 5),
    "a keyword": lambda: spelled(3, word=3),
    "a result": lambda: spelled(3),
    "an argument of a generator": lambda: list(rows(ones(3, 5))),
    "a field": lambda: Pair(ones(3), ones(3), 3),
    "the shapes of two fields": lambda: Pair(ones(3), ones(5)),
    "an argument of a nested function": lambda: nested(3)(3, ones(3)),
    "a keyword of a nested function": lambda: nested(3)(ones(3), other=3),
    "two shapes of a nested function": lambda: nested(3)(ones(3), ones(5)),
    "the result of a nested function": lambda: nested("3")(ones(3), ones(3)),
    "two shapes in the package": lambda: damped_root(ones(3, 5), 1.0),
    "an argument in the package": lambda: tda_lightning.Kronecker(width="4"),
}


@pytest.mark.parametrize("name", CORRECT)
def test_correct_values_pass(name):
    CORRECT[name]()


@pytest.mark.parametrize("name", WRONG)
def test_wrong_values_raise_an_error(name):
    with pytest.raises(TypeError):
        WRONG[name]()


def test_checks_can_be_disabled():
    with type_checks_disabled():
        assert product(ones(3, 5), ones(5, 7), 5).shape == (3, 5)
        assert spelled(3) == 3
        assert nested("3")(3, 5) == "3"
    with pytest.raises(TypeError):
        spelled(3)


def test_only_the_first_calls_of_a_test_are_checked():
    for _ in range(type_checks.CHECKED_CALLS):
        with pytest.raises(TypeError):
            spelled(3)
        with pytest.raises(TypeError):
            nested("3")(ones(3), ones(3))
    assert spelled(3) == 3
    assert nested("3")(ones(3), ones(3)) == "3"
    type_checks.begin_test()
    with pytest.raises(TypeError):
        spelled(3)
