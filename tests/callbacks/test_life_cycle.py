"""The recorder with tuners, weight averaging, copies, full disks and configuration files."""

import copy
import pickle
import subprocess
import sys
from functools import partial

import pytest
import torch
from lightning_models import IndexedVectors, Plain, TrainingLog, loader, mlp, quiet_trainer
from pytorch_lightning import callbacks
from pytorch_lightning.callbacks import (
    BatchSizeFinder,
    LearningRateFinder,
    StochasticWeightAveraging,
)

from tda_lightning import GradientRecorder, HDF5Store
from tda_lightning.stores import MemoryStore


class Tuned(Plain):
    def __init__(self):
        super().__init__(mlp())
        self.batch_size, self.lr = 2, 0.1

    def train_dataloader(self):
        return loader(IndexedVectors(), batch_size=self.batch_size)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.lr)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*The .ckpt. .*|.*_try_loop.*")
@pytest.mark.parametrize("place", ["before", "after"])
@pytest.mark.parametrize(
    "finder",
    [
        lambda: BatchSizeFinder(mode="power", max_trials=2, init_val=2),
        lambda: LearningRateFinder(num_training_steps=5, update_attr=True),
    ],
    ids=["batch size", "learning rate"],
)
def test_trials_of_a_tuner_are_not_recorded(finder, place, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    store, log = MemoryStore(), TrainingLog()
    recorder = GradientRecorder(store)
    ordered = [recorder, finder()] if place == "before" else [finder(), recorder]
    trainer = quiet_trainer(*ordered, log, enable_checkpointing=True)
    model = Tuned()
    trainer.fit(model)
    ids = [batch[0][:, 0].long().tolist() for batch in log.batches]
    assert [step.sample_ids.tolist() for step in store] == ids
    assert [step.index for step in store] == list(range(len(ids)))
    assert len(ids) == 2 * -(-13 // model.batch_size)
    assert all(step.lr == model.lr for step in store)


needs_weight_averaging = pytest.mark.skipif(
    not hasattr(callbacks, "WeightAveraging"), reason="this Lightning has no WeightAveraging"
)


@pytest.mark.filterwarnings("ignore:Swapping scheduler")
@pytest.mark.parametrize(
    "average",
    [
        lambda: StochasticWeightAveraging(swa_lrs=0.05, swa_epoch_start=1),
        pytest.param(lambda: callbacks.WeightAveraging(), marks=needs_weight_averaging),
    ],
    ids=["StochasticWeightAveraging", "WeightAveraging"],
)
def test_weight_averaging_does_not_change_the_steps(average):
    def train(*callbacks):
        torch.manual_seed(1)
        model = Plain(mlp())
        quiet_trainer(*callbacks, max_epochs=4).fit(model, loader(IndexedVectors()))
        return model

    store = MemoryStore()
    plain, recorded = train(average()), train(average(), GradientRecorder(store, audit=1))
    for expected, weight in zip(plain.parameters(), recorded.parameters(), strict=True):
        assert torch.equal(weight, expected)
    assert len(store) == 12
    assert all(float(audit.explained().min()) > 0.9999 for audit in store.audits())


def test_a_model_can_configure_the_recorder():
    store = MemoryStore()

    class ConfiguresRecorder(Plain):
        def configure_callbacks(self):
            return [GradientRecorder(store)]

    quiet_trainer().fit(ConfiguresRecorder(mlp()), loader(IndexedVectors()))
    assert len(store) == 6


@pytest.mark.parametrize(
    "make_copy", [copy.deepcopy, lambda value: pickle.loads(pickle.dumps(value))]
)
def test_a_copy_of_a_recorder_records_before_and_after_use(make_copy, tmp_path):
    # Lightning sets the model's `log` on its callbacks, so the model must be picklable, too.
    model = Plain(mlp(), optimizer=partial(torch.optim.SGD, lr=0.1))
    recorder = make_copy(GradientRecorder(tmp_path / "one", every_n_steps=2))
    quiet_trainer(recorder).fit(model, loader(IndexedVectors()))
    assert len(HDF5Store.open(tmp_path / "one")) == 3
    again = make_copy(recorder)
    again.store.path = tmp_path / "two"
    quiet_trainer(again).fit(model, loader(IndexedVectors()))
    assert len(HDF5Store.open(tmp_path / "two")) == 3


def test_testing_and_predicting_record_nothing():
    class Tested(Plain):
        def test_step(self, batch, batch_idx):
            return self.loss(self.net(batch[0]), batch[1])

        predict_step = test_step

    store = MemoryStore()
    recorder = GradientRecorder(store)
    trainer, model = quiet_trainer(recorder), Tested(mlp())
    trainer.test(model, loader(IndexedVectors(), shuffle=False))
    trainer.predict(model, loader(IndexedVectors(), shuffle=False))
    assert store.run_id is None
    trainer.fit(model, loader(IndexedVectors()))
    trainer.test(model, loader(IndexedVectors(), shuffle=False))
    assert len(store) == 6


def test_a_training_without_batches_is_not_recorded():
    store = MemoryStore()
    quiet_trainer(GradientRecorder(store), limit_train_batches=0).fit(
        Plain(mlp()), loader(IndexedVectors())
    )
    quiet_trainer(GradientRecorder(store), max_epochs=0).fit(Plain(mlp()), loader(IndexedVectors()))
    assert store.run_id is None


FULL_DISK = """
import logging, resource, sys, warnings
logging.disable(logging.CRITICAL)
import torch
torch.set_num_threads(1)
import lean_lightning  # before Lightning
from lightning_models import Plain, loader, mlp, quiet_trainer, vectors
from tda_lightning import GradientRecorder, HDF5Store

def train(*callbacks):
    torch.manual_seed(1)
    model = Plain(mlp())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        quiet_trainer(*callbacks, max_epochs=60).fit(model, loader(vectors()))
    failures = ["the store cannot be written any more" in str(each.message) for each in caught]
    print(sum(failures), [weight.sum().item() for weight in model.parameters()])
    assert not any(module._forward_hooks for module in model.modules())

train()
recorder = GradientRecorder(HDF5Store(sys.argv[1], segment_bytes=20_000))
resource.setrlimit(resource.RLIMIT_FSIZE, (24_000, 24_000))
train(recorder)
"""


@pytest.mark.slow
def test_a_full_disk_stops_the_recording_but_not_the_training(tmp_path, request):
    command = [sys.executable, "-c", FULL_DISK, str(tmp_path / "run")]
    folder = request.path.parents[1] / "support"
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    plain, full = result.stdout.splitlines()
    assert full == "1" + plain.removeprefix("0")
    store = HDF5Store.open(tmp_path / "run")
    assert [step.index for step in store] == list(range(len(store)))
    assert not list((tmp_path / "run").glob(".segment*"))


def test_write_errors_warn_once(tmp_path, monkeypatch):
    from tda_lightning.stores.hdf5 import segment_writer

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(segment_writer, "_fill", full)
    store = HDF5Store(tmp_path / "run", segment_bytes=2_000)
    with pytest.warns(UserWarning, match="No space left on device") as caught:
        quiet_trainer(GradientRecorder(store)).fit(Plain(mlp()), loader(IndexedVectors()))
    assert sum("cannot be written" in str(warning.message) for warning in caught) == 1
    assert len(HDF5Store.open(tmp_path / "run")) == 0


def test_an_environment_variable_turns_recording_on(tmp_path, monkeypatch):
    """The installed package has an entry point for Lightning, so no code is needed."""
    monkeypatch.delenv("TDA_LIGHTNING_STORE", raising=False)
    quiet_trainer().fit(Plain(mlp()), loader(IndexedVectors()))
    assert not (tmp_path / "run").exists()
    monkeypatch.setenv("TDA_LIGHTNING_STORE", str(tmp_path / "run"))
    quiet_trainer().fit(Plain(mlp()), loader(IndexedVectors()))
    assert len(HDF5Store.open(tmp_path / "run")) == 6


def test_a_recorder_in_the_script_may_have_the_store_of_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("TDA_LIGHTNING_STORE", str(tmp_path / "run"))
    quiet_trainer(GradientRecorder(tmp_path / "run")).fit(Plain(mlp()), loader(IndexedVectors()))
    assert len(HDF5Store.open(tmp_path / "run")) == 6


CONFIG = """
trainer:
  max_epochs: 2
  accelerator: cpu
  logger: false
  enable_checkpointing: false
  enable_progress_bar: false
  enable_model_summary: false
  callbacks:
    - class_path: tda_lightning.GradientRecorder
      init_args:
        store: {store}
        every_n_steps: 2
        projector:
          class_path: tda_lightning.CountSketch
          init_args:
            dimension: 64
"""


def test_the_recorder_is_configured_by_yaml(tmp_path, monkeypatch):
    pytest.importorskip("jsonargparse")
    from pytorch_lightning.cli import LightningCLI

    monkeypatch.setattr(sys, "argv", ["train"])
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
    (tmp_path / "config.yaml").write_text(CONFIG.format(store=tmp_path / "run"))
    LightningCLI(
        Tuned,
        args=["fit", "--config", str(tmp_path / "config.yaml")],
        save_config_callback=None,
        seed_everything_default=3,
    )
    store = HDF5Store.open(tmp_path / "run")
    assert store.recipe.every_n_steps == 2
    assert store.recipe.dimension == 64
    assert len(store) == 7
