"""What is said of arguments of a wrong type where nothing checks types, as these tests do."""

import subprocess
import sys

import pytest

SCRIPT = """
import torch
from lightning_models import Plain, loader, mlp, quiet_trainer, vectors
from tda_lightning import *

data, store, model = vectors(), MemoryStore(), Plain(mlp())
quiet_trainer(GradientRecorder(store, snapshots=1)).fit(model, loader(data))
queries, batches = data[:3], loader(data)
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
for name, call in calls.items():
    try:
        call()
    except ValueError as error:
        print(name, error, sep=": ")
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
def said(request):
    command = [sys.executable, "-c", SCRIPT]
    folder = request.path.parent
    found = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    return dict(line.split(": ", 1) for line in found.stdout.splitlines() if ": " in line)


@pytest.mark.parametrize("name", EXPECTED)
def test_a_wrong_argument_is_named_with_what_was_expected(name, said):
    assert EXPECTED[name] in said[name]
