"""Queries at other weights than those at the end of the training warn, unless they are meant."""

import copy
import warnings

import pytest
import torch
from lightning_models import Plain, loader, mlp, quiet_trainer, vectors
from torch import nn

from tda_lightning import (
    FullInfluenceFunction,
    GradientRecorder,
    HDF5Store,
    TracIn,
    add_snapshots,
    attribute,
    attribute_by_gradients,
    record_queries,
)
from tda_lightning.applications import attribute_summary
from tda_lightning.applications.tracing import trace_tokens
from tda_lightning.applications.unlearning import unlearn
from tda_lightning.full_influence import Woodbury
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


OTHER_DOORS = {
    "full gradients": lambda run, model: attribute_by_gradients(
        model,
        loader(vectors(), shuffle=False),
        vectors()[:3],
        run=run,
        method=FullInfluenceFunction(damping=0.1, solver=Woodbury()),
        progress=False,
    ),
    "recorded queries": lambda run, model: record_queries(
        model, vectors()[:3], like=run, progress=False
    ),
    "a summary": lambda run, model: attribute_summary(
        run, model, loader(vectors(), shuffle=False), progress=False
    ),
    "unlearning": lambda run, model: unlearn(
        model, run, loader(vectors(), shuffle=False), [3], progress=False
    ),
    "tokens": lambda run, model: trace_tokens(
        run, model, vectors()[:1], vectors()[1:2], target=_logits
    ),
    "the end of a run": lambda run, model: ask(HDF5Store.open(run)[2:], model),
}


def _logits(model, batch):
    return model.net(batch[0])


@pytest.mark.slow
@pytest.mark.parametrize("door", OTHER_DOORS)
def test_no_function_that_takes_a_run_and_a_model_accepts_other_weights_unnoticed(tmp_path, door):
    model = trained(tmp_path / "run")
    OTHER_DOORS[door](tmp_path / "run", copy.deepcopy(model))
    with pytest.warns(UserWarning, match="not those at the end of the recorded training") as caught:
        OTHER_DOORS[door](tmp_path / "run", Plain(mlp()))
    assert len([each for each in caught if "not those at the end" in str(each.message)]) == 1


def test_queries_can_be_recorded_at_other_weights_that_are_meant(tmp_path):
    trained(tmp_path / "run")
    record_queries(Plain(mlp()), vectors()[:3], like=tmp_path / "run", at="model")


def test_other_running_statistics_warn(tmp_path):
    def network():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(7, 5), nn.BatchNorm1d(5), nn.Linear(5, 3))

    model = Plain(network())
    quiet_trainer(GradientRecorder(tmp_path / "run")).fit(model, loader(vectors()))
    ask(tmp_path / "run", model)
    model.net[1].reset_running_stats()
    with pytest.warns(UserWarning, match="running statistics"):
        ask(tmp_path / "run", model)


def test_checkpoints_of_another_run_are_no_snapshots(tmp_path):
    for name in ("one", "other"):
        trainer = quiet_trainer(GradientRecorder(tmp_path / name, snapshots=0))
        trainer.fit(Plain(mlp()), loader(vectors()))
        trainer.save_checkpoint(tmp_path / f"{name}.ckpt")
    add_snapshots(tmp_path / "one", [tmp_path / "one.ckpt"])
    with pytest.raises(ValueError, match=r"other.ckpt` is a checkpoint of the run '.*expected one"):
        add_snapshots(tmp_path / "one", [tmp_path / "other.ckpt"])
    assert HDF5Store.open(tmp_path / "one").snapshots() == [6]
