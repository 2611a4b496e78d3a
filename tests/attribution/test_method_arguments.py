"""What is said of wrong hyper-parameters of `Unrolled` and `Source`, when they are made."""

import pytest
from unchecked_calls import require_said

CALLS = """
from tda_lightning.attribution import EmpiricalFisher, Exponential

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
}


@pytest.mark.parametrize("name", EXPECTED)
def test_a_wrong_hyper_parameter_is_named_with_what_was_expected(name):
    require_said(CALLS, name, EXPECTED[name])
