"""Wrong arguments of `FullInfluenceFunction`, solvers and curvatures raise and are named."""

import pytest
from unchecked_calls import require_error

CALLS = """
inf = float("inf")
method = FullInfluenceFunction
calls = {
    "a string for a solver": lambda: method("cg"),
    "a class for a solver": lambda: method(Woodbury),
    "a class for a curvature": lambda: method(curvature=GaussNewton),
    "no queries per batch": lambda: method(query_batch_size=0),
    "half a query per batch": lambda: method(query_batch_size=0.5),
    "a string for damping": lambda: method(damping="x"),
    "no damping": lambda: method(damping=0.0),
    "negative damping": lambda: method(damping=-1.0),
    "infinite damping": lambda: method(damping=inf),
    "a string for layers": lambda: method(layers="net.2"),
    "no layers": lambda: method(layers=[]),
    "numbers for layers": lambda: method(layers=[2]),
    "no tolerance": lambda: ConjugateGradient(tolerance=0.0),
    "a string for a tolerance": lambda: ConjugateGradient(tolerance="low"),
    "no products": lambda: ConjugateGradient(products=0),
    "no remainder": lambda: Neumann(remainder=0.0),
    "a remainder of one": lambda: Neumann(remainder=1.0),
    "no terms": lambda: Neumann(terms=0),
    "half a term": lambda: Neumann(terms=0.5),
    "no rank": lambda: Lanczos(0),
    "unknown labels": lambda: EKFAC(labels="one"),
    "no draws": lambda: Woodbury(draws=0),
    "half a draw": lambda: Woodbury(draws=0.5),
    "no memory": lambda: Woodbury(max_gb=0.0),
    "outputs without a loss": lambda: GaussNewton(outputs=lambda module, batch: None),
    "strings for functions": lambda: GaussNewton(outputs="net", loss="mse"),
}
"""
EXPECTED = {
    "a string for a solver": "`solver` is 'cg'; expected an object such as `Woodbury()`.",
    "a class for a solver": "expected an object such as `Woodbury()`.",
    "a class for a curvature": "expected an object such as `GaussNewton()`.",
    "no queries per batch": "`query_batch_size` is 0; expected a whole number of 1 or more.",
    "half a query per batch": "`query_batch_size` is 0.5; expected a whole number",
    "a string for damping": "`damping` is 'x'; expected a finite number above 0.",
    "no damping": "`damping` is 0.0; expected a finite number above 0.",
    "negative damping": "`damping` is -1.0; expected a finite number above 0.",
    "infinite damping": "`damping` is inf; expected a finite number above 0.",
    "a string for layers": "`layers` is 'net.2'; expected a list of names, such as `[\"head\"]`.",
    "no layers": "`layers` is []; expected a list of names",
    "numbers for layers": "`layers` is [2]; expected a list of names",
    "no tolerance": "`tolerance` is 0.0; expected a finite number above 0.",
    "a string for a tolerance": "`tolerance` is 'low'; expected a finite number above 0.",
    "no products": "`products` is 0; expected a whole number of 1 or more.",
    "no remainder": "`remainder` is 0.0; expected a finite number above 0.",
    "a remainder of one": "`remainder` is 1.0; expected a share of the solution, below 1.",
    "no terms": "`terms` is 0; expected a whole number of 1 or more.",
    "half a term": "`terms` is 0.5; expected a whole number",
    "no rank": "`rank` is 0; expected a whole number of 1 or more.",
    "unknown labels": "`labels` is 'one'; expected one of 'all', 'sampled'.",
    "no draws": "`draws` is 0; expected a whole number of 1 or more.",
    "half a draw": "`draws` is 0.5; expected a whole number",
    "no memory": "`max_gb` is 0.0; expected a number above 0.",
    "outputs without a loss": "one of `outputs` and `loss`; expected both, or neither.",
    "strings for functions": "`outputs` is 'net'; expected a function",
}


@pytest.mark.parametrize("name", EXPECTED)
def test_wrong_arguments_raise_with_the_expected_value(name):
    require_error(CALLS, name, EXPECTED[name])
