"""Errors for wrong arguments of `attribute`, of the other query functions, and of stores."""

import pytest
import torch
from lightning_models import Plain, mlp
from unchecked_calls import require_error

from tda_lightning import Scores, self_influence
from tda_lightning.stores import MemoryStore

CALLS = """
from tda_lightning import attribution

saved = "weights.pt"  # in an empty folder
torch.save(model.state_dict(), saved)
scores = Scores(torch.eye(3), torch.arange(3), torch.arange(3), "")
written = HDF5Store("opened.tda")
written.begin(store.recipe)
written.append(store[0])
written.seal()
unopened = HDF5Store("opened.tda")
calls = {
    "an empty batch": lambda: attribute(store, model, data[:0]),
    "a mask of samples": lambda: trajectory(store, model, queries, store.train_ids() < 3),
    "names as ids": lambda: record(model, batches, like=store, sample_ids=lambda b: ["a", "b"]),
    "a mask as ids": lambda: scores.of(scores.train_ids < 2),
    "a matrix of ids": lambda: scores.of([[1, 2]]),
    "a ranking of queries as ids": lambda: scores.of(scores.proponents(2)),
    "words as groups": lambda: scores.grouped(train_labels=["cat"] * 3),
    "a method of full gradients": lambda: attribute(
        store, model, queries, method=FullInfluenceFunction()
    ),
    "a class": lambda: attribute(store, model, queries, method=TracIn),
    "a class for self-influence": lambda: self_influence(store, method=TracIn),
    "a class for features": lambda: attribute_by_features(
        model, batches, queries, method=FeatureSimilarity
    ),
    "a class for gradients": lambda: attribute_by_gradients(
        model, batches, queries, method=FullInfluenceFunction
    ),
    "a store that was not opened": lambda: self_influence(unopened),
    "a method of runs for gradients": lambda: attribute_by_gradients(
        model, batches, queries, method=InfluenceFunction()
    ),
    "a method of runs for features": lambda: attribute_by_features(
        model, batches, queries, method=TracIn()
    ),
    "an unknown moment": lambda: attribute(store, model, queries, at="snapshot"),
    "a dataset": lambda: attribute_by_gradients(model, data, queries),
    "a number as loader": lambda: attribute_by_gradients(model, 3, queries),
    "a dataset for curvature": lambda: attribute_by_gradients(
        model, batches, queries, curvature_loader=data
    ),
    "a dataset for features": lambda: attribute_by_features(model, data, queries),
    "no model": lambda: attribute(store, None, queries),
    "a class as model": lambda: attribute(store, Plain, queries),
    "a number as run": lambda: attribute(3, model, queries),
    "run and model swapped": lambda: attribute(model, store, queries),
    "a list of runs": lambda: self_influence([store, store]),
    "no self-influence": lambda: self_influence(store, method=Source()),
    "an unknown mode": lambda: attribute(store, model, queries, mode="training"),
    "an unknown mode of queries": lambda: record_queries(model, queries, like=store, mode="trian"),
    "queries at a missing step": lambda: record_queries(model, queries, like=store, at=99),
    "queries at step 1.5": lambda: record_queries(model, queries, like=store, at=1.5),
    "queries like an empty run": lambda: record_queries(model, queries, like=store[:0]),
    "an unknown storage": lambda: HDF5Store("run.tda", storage="bf16"),
    "segments of no size": lambda: HDF5Store("run.tda", segment_bytes=0),
    "segments of negative time": lambda: HDF5Store("run.tda", segment_seconds=-1),
    "a number as path": lambda: HDF5Store(3),
    "a sketch of length 0": lambda: CountSketch(0),
    "a negative width": lambda: Kronecker(-1),
    "a length as text": lambda: DenseProjection("large"),
    "a seed as text": lambda: KroneckerCountSketch(seed="x"),
    "the data order of a number": lambda: data_order(3),
    "a single checkpoint": lambda: add_snapshots(store, "last.ckpt"),
    "weights as checkpoint": lambda: add_snapshots(store, [saved]),
    "a checkpoint for a slice": lambda: add_snapshots(store[:2], [saved]),
    "an unknown period": lambda: trajectory(store, model, queries, [3], per="batch"),
    "ids that are not integers": lambda: trajectory(store, model, queries, [1.7]),
    "an id of no sample": lambda: trajectory(store, model, queries, [3, 99]),
    "unknown visits": lambda: InfluenceFunction(rows="last"),
    "unknown steps": lambda: InfluenceFunction(curvature_over="whole run"),
    "a path as rows": lambda: InfluenceFunction(rows_from="run.tda"),
    "an infinite damping": lambda: InfluenceFunction(damping=float("inf")),
    "a negative damping": lambda: TRAK(damping=-1.0),
    "a name as curvature": lambda: InfluenceFunction(curvature="fisher"),
    "an unknown kind of terms": lambda: attribution.EmpiricalFisher("x"),
    "a negative limit": lambda: attribution.Linear(limit=-1),
    "nothing to average": lambda: attribution.Mixed(()),
    "layers as a string": lambda: attribute(store, model, queries, method=TracIn(layers="net.2")),
    "no layers": lambda: attribute(store, model, queries, method=TracIn(layers=[])),
    "no query batch": lambda: top_attributions(store, model, queries, k=1, query_batch_size=0),
    "too many proponents": lambda: top_attributions(store, model, queries, k=99),
    "a method that is not linear": lambda: embed(store, FeatureSimilarity()),
    "a batch as rows": lambda: embed(store).attribute(queries),
    "rows of another length": lambda: embed(store).attribute(torch.ones(2, 3)),
    "a run without steps": lambda: embed(store[:0]),
    "a single object as scores": lambda: Scores.mean(attribute(store, model, queries)),
    "labels as text": lambda: attribute(store, model, queries).grouped(["a", "b", "c"]),
    "a missing query": lambda: trajectory(store, model, queries, [3]).plot(query=99),
    "a dataset to record": lambda: record(model, data, like=store),
}
"""
EXPECTED = {
    "an empty batch": "`queries` is an empty batch; expected at least one sample",
    "a mask of samples": "`train_ids` is a tensor of shape (13,) (torch.bool); expected a list",
    "names as ids": "`sample_ids` returned str objects; expected one integer per sample",
    "a mask as ids": "shape (3,) (torch.bool); expected a list of whole numbers, ids of training",
    "a matrix of ids": "shape (1, 2) (torch.int64); expected a list of whole numbers",
    "a ranking of queries as ids": "a ranking for 3 queries; expected one list of ids. Pass those",
    "words as groups": "`train_labels` are not numbers: ",
    "a method of full gradients": "expected one that reads a run, such as `Unrolled()`.",
    "a class": "`method` is the class `TracIn`; expected an object of it. Call it: `TracIn()`",
    "a class for self-influence": "`method` is the class `TracIn`; expected an object such as",
    "a class for features": "`method` is the class `FeatureSimilarity`; expected an object of it",
    "a class for gradients": "`method` is the class `FullInfluenceFunction`; expected an object",
    "a store that was not opened": "Read it with `HDF5Store.open('opened.tda')`.",
    "a method of runs for gradients": (
        "expected a `FullInfluenceFunction`. Pass methods that read a run to `attribute`"
    ),
    "a method of runs for features": "reads layer features, such as `FeatureSimilarity()`.",
    "a dataset": "`train_loader` is a `TensorDataset`, which yields samples; expected a loader",
    "a number as loader": "`train_loader` is 3; expected a loader of batches",
    "a dataset for curvature": "`curvature_loader` is a `TensorDataset`, which yields samples",
    "a dataset for features": "batches such as the model was trained on: `DataLoader(train_loader,",
    "a dataset to record": "`loader` is a `TensorDataset`, which yields samples; expected a loader",
    "no model": "`model` is a `NoneType`; expected the LightningModule that was trained",
    "a class as model": "Plain'>; expected the LightningModule that was trained: an object",
    "a number as run": "`run` is a `int`; expected the folder of a recorded run, or its store",
    "run and model swapped": "`run` is a `Plain`; expected the folder of a recorded run",
    "a list of runs": "`run` is a `list`; expected the folder of a recorded run",
    "no self-influence": "expected an object such as `TracIn()` or `InfluenceFunction()`",
    "an unknown mode": "`mode` is 'training'; expected one of 'eval', 'train'",
    "an unknown storage": "`storage` is 'bf16'; expected one of 'as computed', 'float16'",
    "segments of no size": "`segment_bytes` is 0; expected a whole number of 1 or more",
    "segments of negative time": "`segment_seconds` is -1; expected a finite number of 0 or more",
    "a number as path": "`path` is 3; expected the path of a folder",
    "a sketch of length 0": "`dimension` is 0; expected a whole number of 1 or more",
    "a negative width": "`width` is -1; expected a whole number of 1 or more",
    "a length as text": "`dimension` is 'large'; expected a whole number",
    "a seed as text": "`seed` is 'x'; expected a whole number of 0 or more",
    "the data order of a number": "`run` is a `int`; expected the folder of a recorded run",
    "a single checkpoint": "`checkpoints` is one path, 'last.ckpt'; expected a list of paths",
    "weights as checkpoint": "is not a Lightning checkpoint; expected the keys `state_dict`",
    "a checkpoint for a slice": "`run` is StoreSlice(2 steps); expected a whole run",
    "an unknown mode of queries": "`mode` is 'trian'; expected one of 'eval', 'train'",
    "queries at a missing step": "`at` is 99, and `like` has 6 steps; expected the position of a",
    "queries at step 1.5": "`at` is 1.5, and `like` has 6 steps; expected the position of a",
    "queries like an empty run": "`at` is -1, and `like` has 0 steps; expected the position of a",
    "an unknown period": "`per` is 'batch'; expected one of 'step', 'epoch'",
    "ids that are not integers": "`train_ids` is [1.7]; expected a list of whole numbers",
    "an id of no sample": "Sample 99 is not among the",
    "unknown visits": "`rows` is 'last'; expected one of 'all visits', 'last visit'",
    "unknown steps": "`curvature_over` is 'whole run'; expected one of 'run', 'last epoch'",
    "a path as rows": "`rows_from` is 'run.tda'; expected an object such as `record(...)` returns",
    "an infinite damping": "`damping` is inf; expected a finite number of 0 or more",
    "a negative damping": "`damping` is -1.0; expected a finite number of 0 or more",
    "a name as curvature": "`curvature` is 'fisher'; expected an object such as `Sampled",
    "an unknown kind of terms": "`terms` is 'x'; expected one of 'ignored', 'independent'",
    "a negative limit": "`limit` is -1; expected a number above 0",
    "nothing to average": "`parts` is empty; expected kinds of curvature",
    "layers as a string": "`layers` is 'net.2'; expected a non-empty list of layer names",
    "no layers": "`layers` is []; expected a non-empty list of layer names",
    "no query batch": "`query_batch_size` is 0; expected a whole number of 1 or more",
    "too many proponents": "`k` is 99; expected a number from 1 to 13",
    "a method that is not linear": "is not linear in the query; expected a method that is",
    "a batch as rows": "`queries` is tuple; expected rows of 146 numbers",
    "rows of another length": "`queries` is (2, 3); expected rows of 146 numbers",
    "a run without steps": "The run has no steps; expected at least one",
    "a single object as scores": "expected at least one `Scores`, in a list",
    "labels as text": "`labels` are not numbers",
    "a missing query": "`query` is 99; expected a position from 0 to 2",
    "an unknown moment": '`at` is \'snapshot\'; expected "now", "model", "snapshots", or',
}


@pytest.mark.parametrize("name", EXPECTED)
def test_wrong_arguments_raise_errors_that_name_them(name):
    require_error(CALLS, name, EXPECTED[name])


def test_too_many_arguments_raise_an_error_that_shows_the_call():
    with pytest.raises(TypeError, match=r"Call it like `self_influence\(run, method=TracIn\(\)\)`"):
        self_influence(MemoryStore(), Plain(mlp()))
    scores = Scores(torch.eye(3), torch.arange(3), torch.arange(3), "")
    with pytest.raises(TypeError, match=r"Call it like `Scores.mean\(\[first, second\]\)`"):
        Scores.mean(scores, scores)
