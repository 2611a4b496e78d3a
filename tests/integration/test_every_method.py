"""Every method through `attribute`, on runs recorded during training."""

import lightning_models as lm
import pytest
import torch

from tda_lightning import (
    TRAK,
    GradientRecorder,
    GradientSimilarity,
    HDF5Store,
    InfluenceFunction,
    Scores,
    Source,
    TracIn,
    Unrolled,
    attribute,
    embed,
    record,
    self_influence,
    top_attributions,
    trajectory,
)
from tda_lightning.attribution import Averaged
from tda_lightning.passes.queries import record_queries
from tda_lightning.stores import MemoryStore

METHODS = [
    TracIn(),
    GradientSimilarity(),
    Unrolled(),
    Source(),
    InfluenceFunction(),
    TRAK(),
    Averaged(),
]
each_method = pytest.mark.parametrize("method", METHODS, ids=repr)


def train(store, seed=0, **settings):
    """Return a model trained with AdamW, recorded with sampled labels."""
    model = lm.Plain(lm.mlp(), optimizer=lambda p: torch.optim.AdamW(p, lr=0.01))
    torch.manual_seed(seed)
    recorder = GradientRecorder(store, curvature="fisher", **settings)
    lm.quiet_trainer(recorder).fit(model, lm.loader(lm.vectors()))
    return model


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    return [(folder / str(seed), train(folder / str(seed), seed)) for seed in (0, 1)]


def queries():
    x, y = lm.vectors().tensors
    return x[:3] + 0.1, y[:3]


@each_method
def test_every_method_returns_finite_scores(trained, method):
    (run, model), _ = trained
    scores = attribute(run, model, queries(), method=method, progress=False)
    assert scores.values.shape == (3, 13)
    assert scores.values.isfinite().all()
    assert scores.values.abs().sum(dim=1).min() > 0
    assert scores.method == repr(method)


@each_method
def test_a_training_sample_near_the_query_scores_above_the_median(trained, method):
    """Queries are slightly shifted training samples."""
    (run, model), _ = trained
    values = attribute(run, model, queries(), method=method, progress=False).values
    assert (values[:, :3].diagonal() > values.median(dim=1).values).all()


@each_method
def test_scores_of_several_runs_are_averaged(trained, method):
    runs, models = [run for run, _ in trained], [model for _, model in trained]
    averaged = attribute(runs, models, queries(), method=method, progress=False)
    each = [attribute(r, m, queries(), method=method, progress=False) for r, m in trained]
    if method != TRAK():  # TRAK averages its two factors separately
        torch.testing.assert_close(averaged.values, Scores.mean(each).values)
    assert averaged.provenance["mean"] == "of 2"
    is_at_snapshots = method == InfluenceFunction()  # Those of both runs have the same steps.
    assert len(set(averaged.provenance["weights"].split("; "))) == 2 - is_at_snapshots


def test_runs_and_models_must_pair_up(trained):
    (run, model), _ = trained
    with pytest.raises(ValueError, match="There are 2 runs and 1 models; expected one model"):
        attribute([run, run], model, queries())


@each_method
def test_trajectories_and_top_scores_agree_with_the_scores(trained, method):
    (run, model), _ = trained
    scores = attribute(run, model, queries(), method=method, progress=False)
    over_time = trajectory(
        run, model, queries(), [4, 2], method=method, per="epoch", progress=False
    )
    torch.testing.assert_close(over_time.total(), scores.values[:, [4, 2]])
    top = top_attributions(
        run, model, queries(), 3, method=method, query_batch_size=2, progress=False
    )
    assert torch.equal(top.proponents.ids, scores.proponents(3).ids)
    assert top.provenance == scores.provenance


def test_embeddings_return_the_scores_of_attribute(trained):
    (run, model), _ = trained
    store = HDF5Store.open(run)
    scores = embed(store, Unrolled(), progress=False).attribute(
        record_queries(model, queries(), like=store, progress=False)
    )
    expected = attribute(run, model, queries(), method=Unrolled(), progress=False)
    torch.testing.assert_close(scores.values, expected.values, rtol=1e-4, atol=1e-6)


def test_an_influence_function_takes_rows_and_curvature_from_a_later_pass(trained):
    (run, model), _ = trained
    store = HDF5Store.open(run)
    later = record(model, lm.loader(lm.vectors()), like=store, labels="sampled", progress=False)
    method = InfluenceFunction(curvature_from=later, rows_from=later)
    scores = attribute(store, model, queries(), method=method, progress=False)
    assert scores.values.isfinite().all()
    self_scores = self_influence(store, method=method, progress=False)
    assert (self_scores.values > 0).all()


def test_scores_hold_their_provenance(trained):
    (run, model), _ = trained
    provenance = attribute(run, model, queries(), method=Unrolled(), progress=False).provenance
    assert provenance["model"] == "Plain"
    assert provenance["optimizer"] == "AdamW"
    assert provenance["steps"] == "6, index 0 to 5"
    assert provenance["rows"].endswith("x float32, coordinates of optimizer")
    assert provenance["mode"] == "eval"


def test_every_method_reads_a_run_without_sampled_labels():
    store = MemoryStore()
    model = lm.Plain(lm.mlp(), optimizer=lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9))
    lm.quiet_trainer(GradientRecorder(store)).fit(model, lm.loader(lm.vectors()))
    for method in METHODS:
        scores = attribute(store, model, queries(), method=method, progress=False)
        assert scores.values.isfinite().all()
