"""Every method through the front door, on real recordings."""

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
from tda_lightning.passes.queries import record_queries
from tda_lightning.stores import MemoryStore

METHODS = [
    TracIn(),
    GradientSimilarity(),
    Unrolled(),
    Source(),
    InfluenceFunction(),
    TRAK(),
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
    folder = tmp_path_factory.mktemp("asked")
    return [(folder / str(seed), train(folder / str(seed), seed)) for seed in (0, 1)]


def asked():
    x, y = lm.vectors().tensors
    return x[:3] + 0.1, y[:3]


@each_method
def test_every_method_answers(trained, method):
    (run, model), _ = trained
    scores = attribute(run, model, asked(), method=method, progress=False)
    assert scores.values.shape == (3, 13)
    assert scores.values.isfinite().all()
    assert scores.values.abs().sum(dim=1).min() > 0
    assert scores.method == repr(method)


@each_method
def test_helpful_samples_are_rather_the_query_s_own_twin(trained, method):
    """Queries are training samples, hardly moved: their twins stand above the median."""
    (run, model), _ = trained
    values = attribute(run, model, asked(), method=method, progress=False).values
    assert (values[:, :3].diagonal() > values.median(dim=1).values).all()


@each_method
def test_several_runs_are_averaged(trained, method):
    runs, models = [run for run, _ in trained], [model for _, model in trained]
    together = attribute(runs, models, asked(), method=method, progress=False)
    each = [attribute(r, m, asked(), method=method, progress=False) for r, m in trained]
    if method != TRAK():  # which averages two factors by themselves
        torch.testing.assert_close(together.values, Scores.mean(each).values)
    assert together.provenance["mean"] == "of 2"
    assert len(set(together.provenance["weights"].split(", "))) == 2


def test_runs_and_models_must_pair_up(trained):
    (run, model), _ = trained
    with pytest.raises(ValueError, match="There are 2 runs and 1 models; expected one model"):
        attribute([run, run], model, asked())


@each_method
def test_trajectories_and_top_scores_agree_with_the_scores(trained, method):
    (run, model), _ = trained
    scores = attribute(run, model, asked(), method=method, progress=False)
    when = trajectory(run, model, asked(), [4, 2], method=method, per="epoch", progress=False)
    torch.testing.assert_close(when.total(), scores.values[:, [4, 2]])
    top = top_attributions(
        run, model, asked(), 3, method=method, query_batch_size=2, progress=False
    )
    assert torch.equal(top.proponents.ids, scores.proponents(3).ids)
    assert top.provenance == scores.provenance


def test_embeddings_answer_as_the_front_door_does(trained):
    (run, model), _ = trained
    store = HDF5Store.open(run)
    found = embed(store, Unrolled(), progress=False).attribute(
        record_queries(model, asked(), like=store, progress=False)
    )
    expected = attribute(run, model, asked(), method=Unrolled(), progress=False)
    torch.testing.assert_close(found.values, expected.values, rtol=1e-4, atol=1e-6)


def test_an_influence_function_takes_rows_and_curvature_from_a_later_pass(trained):
    (run, model), _ = trained
    store = HDF5Store.open(run)
    later = record(model, lm.loader(lm.vectors()), like=store, labels="sampled", progress=False)
    method = InfluenceFunction(curvature_from=later, rows_from=later)
    scores = attribute(store, model, asked(), method=method, progress=False)
    assert scores.values.isfinite().all()
    own = self_influence(store, method=method, progress=False)
    assert (own.values > 0).all()


def test_answers_say_where_they_come_from(trained):
    (run, model), _ = trained
    said = attribute(run, model, asked(), method=Unrolled(), progress=False).provenance
    assert said["model"] == "Plain"
    assert said["optimizer"] == "AdamW"
    assert said["steps"] == "6, index 0 to 5"
    assert said["rows"].endswith("x float32, coordinates of optimizer")
    assert said["mode"] == "eval"


def test_a_run_without_sampled_labels_is_asked_all_the_same():
    store = MemoryStore()
    model = lm.Plain(lm.mlp(), optimizer=lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9))
    lm.quiet_trainer(GradientRecorder(store)).fit(model, lm.loader(lm.vectors()))
    for method in METHODS:
        scores = attribute(store, model, asked(), method=method, progress=False)
        assert scores.values.isfinite().all()
