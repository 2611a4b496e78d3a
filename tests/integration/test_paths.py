"""Paths are absolute from the start: a training that changes its directory loses nothing."""

import os

import pytest
import pytorch_lightning as pl
from lightning_models import Plain, loader, mlp, quiet_trainer, vectors

from tda_lightning import (
    ContributionTracker,
    GradientRecorder,
    HDF5Store,
    Scores,
    TracIn,
    add_snapshots,
    attribute,
)

DATA = vectors()


class ChangesDirectory(pl.Callback):
    """A training that changes its working directory before its fourth step."""

    def __init__(self, folder):
        self.folder = folder

    def on_train_batch_start(self, trainer, module, batch, index):
        if trainer.global_step == 3:
            os.chdir(self.folder)


def rows_of(run):
    return [(step.index, step.sample_ids.tolist(), step.sketch.sum().item()) for step in run]


@pytest.fixture
def folders(tmp_path, monkeypatch):
    for name in ("mine", "other"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "mine")
    return tmp_path / "mine", tmp_path / "other"


@pytest.mark.parametrize("make_store", [str, HDF5Store])
def test_a_change_of_directory_leaves_the_run_whole_and_others_alone(folders, make_store):
    mine, other = folders
    os.chdir(other)
    quiet_trainer(GradientRecorder("run.tda")).fit(Plain(mlp()), loader(DATA))
    before = rows_of(HDF5Store.open("run.tda"))
    os.chdir(mine)
    recorder = GradientRecorder(make_store("run.tda"), snapshots=2)
    quiet_trainer(ChangesDirectory(other), recorder).fit(Plain(mlp()), loader(DATA))
    run = HDF5Store.open(mine / "run.tda")
    assert [step.index for step in run] == list(range(6))
    assert run.snapshots() == [0, 2, 4]
    assert rows_of(HDF5Store.open(other / "run.tda")) == before
    assert len(recorder.store) == 6


def test_a_change_of_directory_leaves_an_open_run_readable(folders):
    mine, other = folders
    quiet_trainer(GradientRecorder("run.tda")).fit(Plain(mlp()), loader(DATA))
    run = HDF5Store.open("run.tda")
    os.chdir(other)
    assert len(rows_of(run)) == 6
    assert run.path == mine / "run.tda"


def test_a_change_of_directory_leaves_the_trackers_file_where_it_was_named(folders):
    mine, other = folders
    tracker = ContributionTracker(DATA[:3], "probe.npz")
    quiet_trainer(ChangesDirectory(other), tracker).fit(Plain(mlp()), loader(DATA))
    assert (mine / "probe.npz").exists()
    assert not (other / "probe.npz").exists()


def test_a_tilde_is_the_home_directory(folders, monkeypatch):
    mine, home = folders
    monkeypatch.setenv("HOME", str(home))
    model, trainer = Plain(mlp()), quiet_trainer(GradientRecorder("~/run.tda"))
    trainer.fit(model, loader(DATA))
    trainer.save_checkpoint(home / "last.ckpt")
    add_snapshots("~/run.tda", ["~/last.ckpt"])
    scores = attribute("~/run.tda", model, DATA[:3], method=TracIn(), progress=False)
    scores.save("~/scores.npz")
    assert len(HDF5Store.open(home / "run.tda")) == 6
    assert 6 in HDF5Store.open("~/run.tda").snapshots()
    assert Scores.load("~/scores.npz").values.equal(scores.values)
    assert (home / "scores.npz").exists()
    assert not list(mine.iterdir())


def test_a_checkpoint_finds_its_recorder_under_the_path_that_was_given(folders):
    assert "run.tda" in GradientRecorder("run.tda").state_key
    assert str(folders[0]) not in GradientRecorder(HDF5Store("run.tda")).state_key
    assert str(folders[0]) not in ContributionTracker(DATA[:3], "probe.npz").state_key
