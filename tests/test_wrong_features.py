"""What is said of wrong arguments of targets, metrics, and methods that read features."""

import pytest
from unchecked import what_is_said

CALLS = """
calls = {
    "a class of a target": lambda: Logit("2"),
    "a class below zero": lambda: Logit(-1),
    "an axis": lambda: Margin(class_axis=2),
    "outputs": lambda: Margin(outputs="net"),
    "labels": lambda: LogProbability(labels="y"),
    "a target": lambda: attribute(store, model, queries, target="margin"),
    "the class of a target": lambda: attribute(store, model, queries, target=Margin),
}
"""
EXPECTED = {
    "a class of a target": "`index` is '2'; expected a whole number of 0 or more",
    "a class below zero": "`index` is -1; expected a whole number of 0 or more",
    "an axis": "`class_axis` is 2; expected one of 1, -1",
    "outputs": "`outputs` is 'net'; expected a function, such as `outputs=lambda module, batch:",
    "labels": "`labels` is 'y'; expected a function, such as `labels=lambda batch: batch[1]`",
    "a target": "the target is 'margin'; expected an object such as `Margin()`, or a function",
    "the class of a target": "expected an object such as `Margin()`, or a function of (module,",
}


@pytest.fixture(scope="module")
def said():
    return what_is_said(CALLS)


@pytest.mark.parametrize("name", EXPECTED)
def test_a_wrong_argument_is_named_with_what_was_expected(name, said):
    assert said[name].startswith("ValueError: ")
    assert EXPECTED[name] in said[name]
