"""Trainings that are started again: existing runs, numbers, log folders and the environment."""

import pytest
import torch
from lightning_models import IndexedVectors, Plain, loader, mlp, quiet_trainer, vectors
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.loggers import CSVLogger
from torch.utils.data import IterableDataset

from tda_lightning import GradientRecorder, HDF5Store, LossRecorder, attribute
from tda_lightning.callbacks.environment import EnvironmentRecorder
from tda_lightning.stores import MemoryStore


def fit(*callbacks, model=None, data=None, ckpt_path=None, **settings):
    trainer = quiet_trainer(*callbacks, **settings)
    model = Plain(mlp()) if model is None else model
    trainer.fit(model, loader(IndexedVectors()) if data is None else data, ckpt_path=ckpt_path)
    return trainer


def indices(path):
    return [step.index for step in HDF5Store.open(path)]


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_numbered_runs_lie_beside_the_first(tmp_path):
    """As in a sweep or in cross-validation: a recorder per training, or one for all."""
    recorder = GradientRecorder(tmp_path / "run.tda", existing="number")
    for _ in range(2):
        fit(recorder)
    assert recorder.store.path == tmp_path / "run-2.tda"
    fit(GradientRecorder(HDF5Store(tmp_path / "run.tda", storage="int8"), existing="number"))
    assert names(tmp_path) == ["run-2.tda", "run-3.tda", "run.tda"]
    assert all(indices(path) == [*range(6)] for path in tmp_path.iterdir())
    ids = {HDF5Store(path).run_id for path in tmp_path.iterdir()}
    assert len(ids) == 3
    sizes = [HDF5Store(tmp_path / name).size_on_disk for name in ("run-2.tda", "run-3.tda")]
    assert sizes[1] < sizes[0]


def test_a_training_that_is_fitted_further_continues_its_number(tmp_path):
    fit(GradientRecorder(tmp_path / "run.tda"))
    recorder, model = GradientRecorder(tmp_path / "run.tda", existing="number"), Plain(mlp())
    trainer = fit(recorder, model=model)
    trainer.fit_loop.max_epochs = 3
    trainer.fit(model, loader(IndexedVectors()))
    assert names(tmp_path) == ["run-2.tda", "run.tda"]
    assert indices(tmp_path / "run-2.tda") == [*range(9)]
    assert indices(tmp_path / "run.tda") == [*range(6)]


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
@pytest.mark.filterwarnings("ignore:Be aware that when using .ckpt_path.")
def test_a_resumed_training_finds_its_number(tmp_path):
    runs = tmp_path / "runs"
    saver = ModelCheckpoint(tmp_path, filename="saved")
    fit(GradientRecorder(runs / "run.tda"))
    fit(GradientRecorder(runs / "run.tda", existing="number"), saver, enable_checkpointing=True)
    fit(GradientRecorder(runs / "run.tda", existing="number"))
    fit(
        GradientRecorder(runs / "run.tda", existing="number"),
        ckpt_path=tmp_path / "saved.ckpt",
        max_epochs=3,
    )
    assert names(runs) == ["run-2.tda", "run-3.tda", "run.tda"]
    lengths = {name: len(indices(runs / name)) for name in names(runs)}
    assert lengths == {"run.tda": 6, "run-2.tda": 9, "run-3.tda": 6}


def test_a_folder_with_other_content_is_passed_over(tmp_path):
    (tmp_path / "run.tda").mkdir()
    (tmp_path / "run.tda" / "notes.txt").write_text("mine")
    (tmp_path / "run-2.tda").write_text("a file")
    fit(GradientRecorder(tmp_path / "run.tda", existing="number"))
    assert indices(tmp_path / "run-3.tda") == [*range(6)]


def test_an_existing_run_is_refused_or_replaced(tmp_path):
    fit(GradientRecorder(tmp_path / "run"))
    first = HDF5Store(tmp_path / "run").run_id
    with pytest.raises(FileExistsError, match="existing='number'"):
        fit(GradientRecorder(tmp_path / "run"))
    assert HDF5Store(tmp_path / "run").run_id == first
    fit(GradientRecorder(tmp_path / "run", existing="replace"))
    assert HDF5Store(tmp_path / "run").run_id != first
    assert names(tmp_path) == ["run"]


def test_without_a_store_it_is_in_the_log_folder(tmp_path):
    recorder, model = GradientRecorder(), Plain(mlp())
    assert len(recorder.store) == 0
    for version in range(2):
        fit(recorder, model=model, logger=CSVLogger(tmp_path, name="logs"))
        assert recorder.store.path == tmp_path / "logs" / f"version_{version}" / "run.tda"
    scores = attribute(recorder.store, model, vectors()[:1], progress=False)
    assert scores.shape == (1, 13)
    for name in ("run.tda", "run-2.tda"):
        fit(GradientRecorder(), default_root_dir=tmp_path / "root")
        assert indices(tmp_path / "root" / name) == [*range(6)]


@pytest.mark.parametrize("store", ["named", "log folder"])
def test_a_fast_dev_run_leaves_nothing_on_disk(tmp_path, store):
    path = tmp_path / "run.tda" if store == "named" else None
    recorder = GradientRecorder(path)
    fit(recorder, fast_dev_run=True, default_root_dir=tmp_path)
    assert names(tmp_path) == []
    assert len(recorder.store) == 1
    fit(recorder, default_root_dir=tmp_path)
    assert indices(tmp_path / "run.tda") == [*range(6)]


@pytest.fixture
def environment(tmp_path, monkeypatch):
    monkeypatch.setenv("TDA_LIGHTNING_STORE", str(tmp_path / "run.tda"))
    return monkeypatch


def test_in_environment_mode_every_training_is_recorded(tmp_path, environment):
    for _ in range(3):
        fit()
    assert names(tmp_path) == ["run-2.tda", "run-3.tda", "run.tda"]
    environment.setenv("TDA_LIGHTNING_EXISTING", "replace")
    first = HDF5Store(tmp_path / "run.tda").run_id
    fit()
    assert len(names(tmp_path)) == 3
    assert HDF5Store(tmp_path / "run.tda").run_id != first


def test_in_environment_mode_a_refusal_does_not_end_the_training(tmp_path, environment):
    environment.setenv("TDA_LIGHTNING_EXISTING", "refuse")
    fit()
    with pytest.warns(UserWarning, match="recording has stopped: .* already"):
        trainer = fit()
    assert trainer.global_step == 6
    assert indices(tmp_path / "run.tda") == [*range(6)]
    environment.setenv("TDA_LIGHTNING_EXISTING", "keep")
    with pytest.raises(ValueError, match="`TDA_LIGHTNING_EXISTING` is 'keep'; expected one of"):
        quiet_trainer()


class Stream(IterableDataset):
    def __iter__(self):
        data = IndexedVectors()
        return (data[index] for index in range(13))


def test_in_environment_mode_unknown_ids_do_not_end_the_training(tmp_path, environment):
    data = torch.utils.data.DataLoader(Stream(), batch_size=5)
    with pytest.warns(UserWarning, match="recording has stopped: .* iterable dataset"):
        trainer = fit(data=data)
    assert trainer.global_step == 6
    assert not (tmp_path / "run.tda").exists()


def test_in_environment_mode_a_recorder_in_the_script_takes_precedence(tmp_path, environment):
    store = MemoryStore()
    fit(GradientRecorder(store))
    assert len(store) == 6
    assert names(tmp_path) == []


def test_in_environment_mode_a_loss_recorder_at_the_same_path_takes_precedence(
    tmp_path, environment
):
    fit(LossRecorder(tmp_path / "other"))
    assert names(tmp_path) == ["other", "run.tda"]
    environment.setenv("TDA_LIGHTNING_STORE", str(tmp_path / "losses"))
    fit(LossRecorder(tmp_path / "losses"))
    assert HDF5Store.open(tmp_path / "losses").recipe.projector == {"name": "none"}
    assert names(tmp_path) == ["losses", "other", "run.tda"]


def test_the_environment_has_its_own_recorder(environment):
    kinds = [type(callback) for callback in quiet_trainer().callbacks]
    assert kinds.count(EnvironmentRecorder) == 1


class LateStream(Plain):
    """Trains on a stream, whose ids are unknown, from the second epoch on."""

    def train_dataloader(self):
        is_first = self.trainer.global_step == 0
        return loader(IndexedVectors() if is_first else Stream(), batch_size=5, shuffle=False)


@pytest.mark.usefixtures("environment")
def test_in_environment_mode_a_run_that_is_not_whole_has_no_fingerprint(tmp_path):
    trainer = quiet_trainer(max_epochs=3, reload_dataloaders_every_n_epochs=1)
    with pytest.warns(UserWarning, match="recording has stopped: .* iterable") as record:
        trainer.fit(LateStream(mlp()))
    assert sum("recording has stopped" in str(warning.message) for warning in record) == 1
    run = HDF5Store.open(tmp_path / "run.tda")
    assert (len(run), trainer.global_step) == (3, 9)
    assert run.final_fingerprint is None
