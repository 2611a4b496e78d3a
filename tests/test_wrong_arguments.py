"""What is said of arguments of a wrong type, in `attribute` and its like."""

import pytest
from unchecked import what_is_said

CALLS = """
calls = {
    "a method of whole gradients": lambda: attribute(
        store, model, queries, method=FullInfluenceFunction()
    ),
    "a class": lambda: attribute(store, model, queries, method=TracIn),
    "a method of runs": lambda: attribute_by_gradients(
        model, batches, queries, method=InfluenceFunction()
    ),
    "a method of runs, for features": lambda: attribute_by_features(
        model, batches, queries, method=TracIn()
    ),
    "another moment": lambda: attribute(store, model, queries, at="snapshot"),
    "a dataset": lambda: attribute_by_gradients(model, data, queries),
    "a dataset for the curvature": lambda: attribute_by_gradients(
        model, batches, queries, curvature_loader=data
    ),
    "a dataset for features": lambda: attribute_by_features(model, data, queries),
    "a dataset to record": lambda: record(model, data, like=store),
}
"""
EXPECTED = {
    "a method of whole gradients": "expected one that reads a run, `Unrolled()` say.",
    "a class": "`method` is <class 'tda_lightning.attribution.tracin.TracIn'>; expected one",
    "a method of runs": "expected a `FullInfluenceFunction`. Others are asked by `attribute`",
    "a method of runs, for features": "expected one that reads features, `FeatureSimilarity()`",
    "a dataset": "`train_loader` is a `TensorDataset`, which yields samples; expected a loader",
    "a dataset for the curvature": "`curvature_loader` is a `TensorDataset`, which yields samples",
    "a dataset for features": "batches such as the model was trained on: `DataLoader(train_loader,",
    "a dataset to record": "`loader` is a `TensorDataset`, which yields samples; expected a loader",
    "another moment": '`at` is \'snapshot\'; expected "now", "snapshots", or the index',
}


@pytest.fixture(scope="module")
def said():
    return what_is_said(CALLS)


@pytest.mark.parametrize("name", EXPECTED)
def test_a_wrong_argument_is_named_with_what_was_expected(name, said):
    assert said[name].startswith("ValueError: ")
    assert EXPECTED[name] in said[name]
