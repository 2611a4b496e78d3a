"""Queries at other weights than those at the end of the training warn, unless they are meant."""

import copy
import warnings

import pytest
import torch
from lightning_models import Plain, loader, mlp, quiet_trainer, vectors

from tda_lightning import GradientRecorder, HDF5Store, TracIn, attribute
from tda_lightning.passes import model_state
from tda_lightning.passes.model_state import fingerprint
from tda_lightning.stores import MemoryStore


@pytest.fixture(autouse=True)
def nothing_warned_of_yet(monkeypatch):
    monkeypatch.setattr(model_state, "_WARNED", set())


def trained(store):
    model = Plain(mlp())
    quiet_trainer(GradientRecorder(store, snapshots=2), max_epochs=2).fit(model, loader(vectors()))
    return model


def ask(run, model, **settings):
    return attribute(run, model, vectors()[:3], method=TracIn(), progress=False, **settings).values


@pytest.mark.parametrize("kind", ["memory", "disk"])
def test_other_weights_warn_with_the_remedy(tmp_path, kind):
    store = MemoryStore() if kind == "memory" else HDF5Store(tmp_path / "run")
    model = trained(store)
    assert store.final_fingerprint == fingerprint(model)
    run = store if kind == "memory" else tmp_path / "run"
    ask(run, copy.deepcopy(model))
    with pytest.warns(
        UserWarning, match=r'not those at the end .*checkpoint, or pass `at="model"`'
    ):
        ask(run, Plain(mlp()))


@pytest.mark.parametrize("at", ["model", 4, "snapshots"])
def test_other_weights_that_are_meant_do_not_warn(tmp_path, at):
    trained(tmp_path / "run")
    ask(tmp_path / "run", Plain(mlp()), at=at)


def test_the_model_as_it_is_gives_the_same_scores_as_now(tmp_path):
    model = trained(tmp_path / "run")
    assert torch.equal(ask(tmp_path / "run", model), ask(tmp_path / "run", model, at="model"))


def test_a_part_of_a_run_does_not_warn(tmp_path):
    """The weights from the end of the part are not known."""
    trained(tmp_path / "run")
    ask(HDF5Store.open(tmp_path / "run")[:3], Plain(mlp()))


def test_a_loop_warns_once(tmp_path):
    trained(tmp_path / "run")
    model = Plain(mlp())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for _ in range(3):
            ask(tmp_path / "run", model)
    assert len([entry for entry in caught if "end of the recorded" in str(entry.message)]) == 1


def test_a_resumed_run_forgets_the_end(tmp_path):
    trained(tmp_path / "run")
    HDF5Store(tmp_path / "run").resume(3)
    assert HDF5Store.open(tmp_path / "run").final_fingerprint is None


def test_weights_that_a_callback_swaps_in_at_the_end_count(tmp_path):
    class Swaps(Plain):
        def on_train_end(self):
            torch.nn.init.ones_(next(self.parameters()))

    model = Swaps(mlp())
    quiet_trainer(GradientRecorder(tmp_path / "run")).fit(model, loader(vectors()))
    assert HDF5Store.open(tmp_path / "run").final_fingerprint == fingerprint(model)
