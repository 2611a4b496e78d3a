"""Automatic snapshots, and the weights at which each method evaluates queries by default."""

import threading

import pytest
import pytorch_lightning as pl
import torch
from lightning_models import Plain, loader, mlp, quiet_trainer, vectors
from torch import nn
from torch.utils.data import DataLoader

from tda_lightning import (
    GradientRecorder,
    HDF5Store,
    InfluenceFunction,
    TracIn,
    Unrolled,
    attribute,
    top_attributions,
    trajectory,
)
from tda_lightning.attribution import Averaged
from tda_lightning.passes.model_state import fingerprint, swapped_weights
from tda_lightning.stores import MemoryStore

DATA = vectors(13)
QUERIES = DATA[:3]


def trained(store, epochs=5, snapshots="auto", model=None, **limits):
    model = model or Plain(mlp())
    recorder = GradientRecorder(store, snapshots=snapshots, **limits)
    quiet_trainer(recorder, max_epochs=epochs).fit(model, loader(DATA))  # 3 steps per epoch
    return model


@pytest.fixture
def run(tmp_path):
    return tmp_path / "run.tda", trained(tmp_path / "run.tda")


def scores(run, **arguments):
    path, model = run
    return attribute(path, model, QUERIES, progress=False, **arguments).values


def test_weights_are_saved_after_each_fifth_of_the_training(run):
    assert HDF5Store.open(run[0]).snapshots() == [3, 6, 9, 12]


def test_an_influence_function_takes_the_mean_over_them(run):
    by_default = scores(run, method=InfluenceFunction())
    assert by_default.equal(scores(run, method=InfluenceFunction(), at="snapshots"))
    assert not by_default.equal(scores(run, method=InfluenceFunction(), at="now"))


@pytest.mark.parametrize("method", [Unrolled(), TracIn()], ids=repr)
def test_other_methods_take_the_weights_that_the_model_has(run, method):
    assert scores(run, method=method).equal(scores(run, method=method, at="now"))


def test_each_averaged_method_takes_its_own(run):
    parts = scores(run, method=Unrolled()), scores(run, method=InfluenceFunction())
    torch.testing.assert_close(scores(run), (parts[0] + parts[1]) / 2)


def test_nested_means_take_the_same(run):
    nested = Averaged((Averaged((InfluenceFunction(),)), Unrolled()))
    torch.testing.assert_close(scores(run, method=nested), scores(run))


def test_trajectories_and_top_scores_agree_with_the_scores(run):
    path, model = run
    over_time = trajectory(path, model, QUERIES, [4, 2], per="epoch", progress=False)
    torch.testing.assert_close(over_time.total(), scores(run)[:, [4, 2]])
    top = top_attributions(path, model, QUERIES, 3, query_batch_size=2, progress=False)
    torch.testing.assert_close(top.proponents.values, scores(run).topk(3).values)


def test_several_runs_may_have_snapshots_or_none():
    stores = [MemoryStore(), MemoryStore()]
    models = [trained(stores[0]), trained(stores[1], snapshots=0)]
    both = attribute(stores, models, QUERIES, progress=False)
    each = [
        attribute(s, m, QUERIES, progress=False).values for s, m in zip(stores, models, strict=True)
    ]
    torch.testing.assert_close(both.values, (each[0] + each[1]) / 2)


@pytest.mark.parametrize("is_shuffled", [False, True])
def test_a_loader_gives_each_sample_the_scores_of_a_batch(run, monkeypatch, is_shuffled):
    """Also where only a few of its batches are held in memory at a time."""
    monkeypatch.setattr("tda_lightning.passes.query_batches._MAX_GROUP_BYTES", 300)
    path, model = run
    data = DataLoader(DATA, 4, shuffle=is_shuffled)
    answer = attribute(path, model, data, progress=False)
    expected = attribute(path, model, DATA[answer.query_ids.tolist()], progress=False)
    torch.testing.assert_close(answer.values, expected.values)
    assert answer.query_ids.sort().values.equal(torch.arange(13))
    assert is_shuffled or answer.query_ids.equal(torch.arange(13))


def test_the_provenance_names_all_weights(run):
    path, model = run
    weights = attribute(path, model, QUERIES, progress=False).provenance["weights"]
    assert weights == f"{fingerprint(model)} and the mean of 3 snapshots, steps 6 to 12"


def test_a_resumed_training_saves_the_same(tmp_path):
    model = Plain(mlp())
    first = quiet_trainer(GradientRecorder(tmp_path / "run"), max_epochs=2)
    first.fit(model, loader(DATA))
    first.save_checkpoint(tmp_path / "last.ckpt")
    again = quiet_trainer(GradientRecorder(tmp_path / "run"), max_epochs=5)
    again.fit(Plain(mlp()), loader(DATA), ckpt_path=tmp_path / "last.ckpt")
    # Those before the checkpoint are at fifths of the shorter training.
    assert HDF5Store.open(tmp_path / "run").snapshots() == [1, 2, 3, 4, 6, 9, 12]


def test_a_training_of_unknown_length_saves_none(tmp_path):
    class Once(pl.Callback):
        def on_train_epoch_end(self, trainer, module):
            trainer.should_stop = True

    recorder = GradientRecorder(tmp_path / "run")
    quiet_trainer(recorder, Once(), max_epochs=-1).fit(Plain(mlp()), loader(DATA))
    assert HDF5Store.open(tmp_path / "run").snapshots() == []


def test_large_weights_are_not_saved(tmp_path):
    class Large(Plain):
        def __init__(self):
            super().__init__(mlp())
            self.register_buffer("table", torch.zeros(2**22 + 2**10))  # 16 MiB and a little

    trained(tmp_path / "run", model=Large())
    assert HDF5Store.open(tmp_path / "run").snapshots() == []


def test_they_count_for_the_limit_of_disk_space(tmp_path):
    """Here snapshots take a little less than a tenth of the limit, or a little more."""
    size = sum(w.numel() * w.element_size() for w in mlp().state_dict().values())
    trained(tmp_path / "small", max_gb=4 * size / 0.9e8)
    trained(tmp_path / "large", max_gb=4 * size / 1.1e8)
    assert len(HDF5Store.open(tmp_path / "small").snapshots()) == 4
    assert HDF5Store.open(tmp_path / "large").snapshots() == []


def test_a_model_that_they_do_not_fit_is_queried_at_its_weights(run):
    path, model = run
    model.register_buffer("added_later", torch.zeros(3))
    fit = r"snapshots do not fit the `Plain`.*`at=\"now\"`"
    with pytest.warns(UserWarning, match=fit), pytest.warns(UserWarning, match="not those at"):
        by_default = attribute(path, model, QUERIES, progress=False).values
    assert by_default.equal(scores(run, at="now"))


def test_no_thread_changes_the_weights_that_another_one_queries(run):
    _, model = run
    before, outcome = fingerprint(model), []
    changed = {name: weight + 1 for name, weight in model.state_dict().items()}

    def swap():
        try:
            with swapped_weights(model, changed):
                outcome.append("swapped")
        except RuntimeError as error:
            outcome.append(str(error))

    with swapped_weights(model, model.state_dict()):
        thread = threading.Thread(target=swap)
        thread.start()
        thread.join()
        assert fingerprint(model) == before
    assert "by another thread" in outcome[0]
    swap()
    assert outcome[1] == "swapped"


def test_batch_norms_are_restored(tmp_path):
    network = nn.Sequential(nn.Linear(7, 5), nn.BatchNorm1d(5), nn.Linear(5, 3))
    model = trained(tmp_path / "run", model=Plain(network))
    before = fingerprint(model)
    attribute(tmp_path / "run", model, QUERIES, progress=False)
    assert fingerprint(model) == before
