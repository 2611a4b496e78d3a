"""Errors for wrong hyper-parameters of methods, raised on construction."""

import pytest
from unchecked_calls import require_error

CALLS = """
from tda_lightning.attribution import Averaged, EmpiricalFisher, Exponential

calls = {
    "a word for a curvature": lambda: Unrolled(curvature="fisher"),
    "a class for a curvature": lambda: Unrolled(EmpiricalFisher),
    "a word for a propagator": lambda: Unrolled(propagator="linear"),
    "a class for a propagator": lambda: Unrolled(propagator=Exponential),
    "a curvature for source": lambda: Source(curvature="fisher"),
    "a propagator for source": lambda: Source(propagator="linear"),
    "half a segment": lambda: Source(2.5),
    "no segment": lambda: Source(0),
    "segments in words": lambda: Source("three"),
    "no methods": lambda: Averaged(()),
    "a list of methods": lambda: Averaged([Unrolled()]),
    "a class for a method": lambda: Averaged((Unrolled,)),
    "a word for a method": lambda: Averaged(("unrolled",)),
}
"""
EXPECTED = {
    "a word for a curvature": "`curvature` is 'fisher'; expected an object such as `BestAvailable",
    "a class for a curvature": "expected an object such as `BestAvailable()`.",
    "a word for a propagator": "`propagator` is 'linear'; expected an object such as `Exponential",
    "a class for a propagator": "`Exponential()` or `Linear()`.",
    "a curvature for source": "`curvature` is 'fisher'; expected an object such as `BestAvailable",
    "a propagator for source": "`propagator` is 'linear'; expected an object such as `Exponential",
    "half a segment": "`segments` is 2.5; expected a whole number of 1 or more.",
    "no segment": "`segments` is 0; expected a whole number of 1 or more.",
    "segments in words": "`segments` is 'three'; expected a whole number of 1 or more.",
    "no methods": "`methods` is empty; expected at least one. Pass `(Unrolled(),)`.",
    "a list of methods": "expected an object such as `(Unrolled(), InfluenceFunction())`.",
    "a class for a method": "`methods` is the class `Unrolled`; expected an object such as",
    "a word for a method": "`methods` is 'unrolled'; expected an object such as",
}


@pytest.mark.parametrize("name", EXPECTED)
def test_wrong_hyper_parameters_raise_with_the_expected_kind(name):
    require_error(CALLS, name, EXPECTED[name])
