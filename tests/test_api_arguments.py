"""What is said of arguments of a wrong type, in `attribute` and its like."""

import pytest
from unchecked_calls import require_said

CALLS = """
import tempfile
from tda_lightning import attribution

saved = tempfile.mkdtemp() + "/weights.pt"
torch.save(model.state_dict(), saved)
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
    "no loader": lambda: attribute_by_gradients(model, 3, queries),
    "a dataset for the curvature": lambda: attribute_by_gradients(
        model, batches, queries, curvature_loader=data
    ),
    "a dataset for features": lambda: attribute_by_features(model, data, queries),
    "another model": lambda: attribute(store, None, queries),
    "a class of models": lambda: attribute(store, Plain, queries),
    "a run that is none": lambda: attribute(3, model, queries),
    "run and model in turn": lambda: attribute(model, store, queries),
    "several runs for one": lambda: self_influence([store, store]),
    "no self-influence": lambda: self_influence(store, method=Unrolled()),
    "another mode": lambda: attribute(store, model, queries, mode="training"),
    "another mode of queries": lambda: record_queries(model, queries, like=store, mode="trian"),
    "queries at no step": lambda: record_queries(model, queries, like=store, at=99),
    "queries at half a step": lambda: record_queries(model, queries, like=store, at=1.5),
    "queries like nothing": lambda: record_queries(model, queries, like=store[:0]),
    "another storage": lambda: HDF5Store("run.tda", storage="bf16"),
    "a store of no size": lambda: HDF5Store("run.tda", segment_bytes=0),
    "a store of no time": lambda: HDF5Store("run.tda", segment_seconds=-1),
    "a store at no path": lambda: HDF5Store(3),
    "a sketch of no length": lambda: CountSketch(0),
    "a side of no length": lambda: Kronecker(-1),
    "a length in words": lambda: DenseProjection("large"),
    "a seed in words": lambda: KroneckerCountSketch(seed="x"),
    "the order of nothing": lambda: data_order(3),
    "one checkpoint": lambda: add_snapshots(store, "last.ckpt"),
    "weights for a checkpoint": lambda: add_snapshots(store, [saved]),
    "a checkpoint for a slice": lambda: add_snapshots(store[:2], [saved]),
    "another period": lambda: trajectory(store, model, queries, [3], per="batch"),
    "ids that are no numbers": lambda: trajectory(store, model, queries, [1.7]),
    "another kind of visits": lambda: InfluenceFunction(rows="last"),
    "another kind of steps": lambda: InfluenceFunction(curvature_over="whole run"),
    "a path to rows": lambda: InfluenceFunction(rows_from="run.tda"),
    "an infinite damping": lambda: InfluenceFunction(damping=float("inf")),
    "a negative damping": lambda: TRAK(damping=-1.0),
    "curvature by its name": lambda: InfluenceFunction(curvature="fisher"),
    "other terms": lambda: attribution.EmpiricalFisher("x"),
    "a rule that takes nothing": lambda: attribution.Linear(limit=-1),
    "nothing to average": lambda: attribution.Mixed(()),
    "layers as one word": lambda: attribute(store, model, queries, method=TracIn(layers="net.2")),
    "no layers": lambda: attribute(store, model, queries, method=TracIn(layers=[])),
    "no queries at once": lambda: top_attributions(store, model, queries, k=1, query_batch_size=0),
    "too many to name": lambda: top_attributions(store, model, queries, k=99),
    "no linear method": lambda: embed(store, FeatureSimilarity()),
    "a batch for rows": lambda: embed(store).attribute(queries),
    "rows of another length": lambda: embed(store).attribute(torch.ones(2, 3)),
    "a run without steps": lambda: embed(store[:0]),
    "scores that are one": lambda: Scores.mean(attribute(store, model, queries)),
    "labels that are words": lambda: attribute(store, model, queries).grouped(["a", "b", "c"]),
    "no such query": lambda: trajectory(store, model, queries, [3]).plot(query=99),
    "a dataset to record": lambda: record(model, data, like=store),
}
"""
EXPECTED = {
    "a method of whole gradients": "expected one that reads a run, such as `Unrolled()`.",
    "a class": "`method` is <class 'tda_lightning.attribution.tracin.TracIn'>; expected one",
    "a method of runs": "expected a `FullInfluenceFunction`. Others are asked by `attribute`",
    "a method of runs, for features": "expected one that reads features, `FeatureSimilarity()`",
    "a dataset": "`train_loader` is a `TensorDataset`, which yields samples; expected a loader",
    "no loader": "`train_loader` is 3; expected a loader of batches",
    "a dataset for the curvature": "`curvature_loader` is a `TensorDataset`, which yields samples",
    "a dataset for features": "batches such as the model was trained on: `DataLoader(train_loader,",
    "a dataset to record": "`loader` is a `TensorDataset`, which yields samples; expected a loader",
    "another model": "`model` is a `NoneType`; expected the LightningModule that was trained",
    "a class of models": "Plain'>; expected the LightningModule that was trained: an object",
    "a run that is none": "`run` is a `int`; expected the folder of a recorded run, or its store",
    "run and model in turn": "`run` is a `Plain`; expected the folder of a recorded run",
    "several runs for one": "`run` is a `list`; expected the folder of a recorded run",
    "no self-influence": "expected an object such as `TracIn()` or `InfluenceFunction()`",
    "another mode": "`mode` is 'training'; expected one of 'eval', 'train'",
    "another storage": "`storage` is 'bf16'; expected one of 'as computed', 'float16'",
    "a store of no size": "`segment_bytes` is 0; expected a whole number of 1 or more",
    "a store of no time": "`segment_seconds` is -1; expected a finite number of 0 or more",
    "a store at no path": "`path` is 3; expected that of a folder",
    "a sketch of no length": "`dimension` is 0; expected a whole number of 1 or more",
    "a side of no length": "`width` is -1; expected a whole number of 1 or more",
    "a length in words": "`dimension` is 'large'; expected a whole number",
    "a seed in words": "`seed` is 'x'; expected a whole number of 0 or more",
    "the order of nothing": "`run` is a `int`; expected the folder of a recorded run",
    "one checkpoint": "`checkpoints` is one path, 'last.ckpt'; expected a list of them",
    "weights for a checkpoint": "is no checkpoint of a trainer: expected `state_dict`",
    "a checkpoint for a slice": "`run` is StoreSlice(2 steps); expected the whole of a run",
    "another mode of queries": "`mode` is 'trian'; expected one of 'eval', 'train'",
    "queries at no step": "`at` is 99, and `like` has 6 steps; expected the place of one",
    "queries at half a step": "`at` is 1.5, and `like` has 6 steps; expected the place of one",
    "queries like nothing": "`at` is -1, and `like` has 0 steps; expected the place of one",
    "another period": "`per` is 'batch'; expected one of 'step', 'epoch'",
    "ids that are no numbers": "`train_ids` is [1.7]; expected a list of whole numbers",
    "another kind of visits": "`rows` is 'last'; expected one of 'all visits', 'last visit'",
    "another kind of steps": "`curvature_over` is 'whole run'; expected one of 'run', 'last epoch'",
    "a path to rows": "`rows_from` is 'run.tda'; expected an object such as `record(...)` returns",
    "an infinite damping": "`damping` is inf; expected a finite number of 0 or more",
    "a negative damping": "`damping` is -1.0; expected a finite number of 0 or more",
    "curvature by its name": "`curvature` is 'fisher'; expected an object such as `Sampled",
    "other terms": "`terms` is 'x'; expected one of 'ignored', 'independent'",
    "a rule that takes nothing": "`limit` is -1; expected a number above 0",
    "nothing to average": "`parts` is empty; expected kinds of curvature",
    "layers as one word": "`layers` is 'net.2'; expected a list of names",
    "no layers": "`layers` is []; expected a list of names, of one layer at least",
    "no queries at once": "`query_batch_size` is 0; expected a whole number of 1 or more",
    "too many to name": "`k` is 99; expected a number from 1 to 13",
    "no linear method": "is not linear in the query; expected a method that is",
    "a batch for rows": "`queries` is tuple; expected rows of 146 numbers",
    "rows of another length": "`queries` is (2, 3); expected rows of 146 numbers",
    "a run without steps": "The run has no step; expected at least one",
    "scores that are one": "expected at least one `Scores`, in a list",
    "labels that are words": "`labels` are no numbers",
    "no such query": "`query` is 99; expected a place from 0 to 2",
    "another moment": '`at` is \'snapshot\'; expected "now", "snapshots", or the index',
}


@pytest.mark.parametrize("name", EXPECTED)
def test_a_wrong_argument_is_named_with_what_was_expected(name):
    require_said(CALLS, name, EXPECTED[name])
