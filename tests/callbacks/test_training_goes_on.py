"""What goes wrong while recording ends the recording, with one warning, and never the training."""

import copy

import pytest
import pytorch_lightning as pl
import torch
from lightning_models import Plain, loader, mlp, quiet_trainer, vectors
from torch.nn import functional
from torch.utils.data import DataLoader, IterableDataset, default_collate

from tda_lightning import GradientRecorder, HDF5Store, TracIn, Unrolled, attribute
from tda_lightning.recording.taken_step import StepsTogether
from tda_lightning.stores import MemoryStore
from tda_lightning.stores.hdf5 import snapshot_files

DATA = vectors()


def trained(*callbacks, module=None, data=None):
    module = module or Plain(mlp())
    trainer = quiet_trainer(*callbacks)
    trainer.fit(module, data or loader(DATA, shuffle=False))
    return trainer, {name: value.clone() for name, value in module.state_dict().items()}


def same_weights(a, b):
    return all(torch.equal(a[name], b[name]) for name in a)


def test_a_disk_that_is_full_during_a_snapshot_ends_the_recording_only(tmp_path, monkeypatch):
    save = torch.save

    def fill_disk(weights, path):
        if "00000004" in str(path):
            raise RuntimeError("basic_ios::clear: iostream error")
        save(weights, path)

    monkeypatch.setattr(snapshot_files.torch, "save", fill_disk)
    recorder = GradientRecorder(tmp_path / "run", snapshots=2)
    with pytest.warns(UserWarning, match=r"snapshot-00000004\.pt` failed: basic_ios") as record:
        trainer, weights = trained(recorder)
    assert sum("GradientRecorder" in str(warning.message) for warning in record) == 1
    assert trainer.global_step == 6
    assert same_weights(weights, trained()[1])
    run = HDF5Store.open(tmp_path / "run")
    assert [step.index for step in run] == [0, 1, 2, 3]
    assert run.snapshots() == [0, 2]
    assert not list((tmp_path / "run").glob(".*.partial"))


class FailingStore(MemoryStore):
    """A store with errors that are not the library's, such as a custom one."""

    def append(self, step):
        if step.index == 3:
            raise ConnectionRefusedError if self.is_system_error else KeyError("row")
        super().append(step)


@pytest.mark.parametrize("is_system_error", [True, False])
def test_a_store_that_fails_ends_the_recording_only(is_system_error):
    store = FailingStore()
    store.is_system_error = is_system_error
    with pytest.warns(UserWarning, match="cannot be written any more"):
        trainer, weights = trained(GradientRecorder(store))
    assert trainer.global_step == 6
    assert same_weights(weights, trained()[1])
    assert len(store) == 3


class LeavesFile(pl.Callback):
    def __init__(self, path):
        self.path = path

    def on_train_batch_start(self, trainer, module, batch, index):
        if trainer.global_step == 1:
            self.path.write_bytes(b"mine")


def test_files_of_the_user_in_the_folder_are_neither_read_nor_deleted(tmp_path):
    names = ("snapshot-best.pt", "segment-best.h5", "snapshot-7.pt", "segment-000001.h5.bak")
    mine = [tmp_path / "run" / name for name in names]
    recorder = GradientRecorder(tmp_path / "run", snapshots=2)
    trainer, _ = trained(recorder, *map(LeavesFile, mine))
    assert trainer.global_step == 6
    run = HDF5Store.open(tmp_path / "run")
    assert run.snapshots() == [0, 2, 4]
    assert len(list(run)) == 6
    recorder.store.resume(3)
    recorder.store.clear()
    assert sorted(path for path in (tmp_path / "run").iterdir()) == sorted(mine)


class WithEmptyBatch:
    """A batch sampler whose second batch is empty."""

    def __iter__(self):
        return iter([[0, 1, 2], [], [3, 4], [5, 6]])

    def __len__(self):
        return 4


def collate(samples):
    return default_collate(samples) if samples else [tensor[:0] for tensor in DATA.tensors]


def summed(outputs, labels):
    return functional.cross_entropy(outputs, labels, reduction="sum")


@pytest.mark.parametrize("ids", [None, lambda batch: batch[0][:, 0].long().tolist()])
def test_an_empty_batch_of_a_summed_loss_contributes_nothing(tmp_path, ids):
    data = DataLoader(DATA, batch_sampler=WithEmptyBatch(), collate_fn=collate)
    module = Plain(mlp(), summed)
    recorder = GradientRecorder(tmp_path / "run", reduction="sum", sample_ids=ids)
    trainer, weights = trained(recorder, module=module, data=data)
    assert trainer.global_step == 8
    assert same_weights(weights, trained(module=Plain(mlp(), summed), data=data)[1])
    run = HDF5Store.open(tmp_path / "run")
    assert [step.index for step in run] == [0, 2, 3, 4, 6, 7]
    assert [len(step.sample_ids) for step in run] == [3, 2, 2] * 2
    for method in (TracIn(), Unrolled()):
        assert attribute(run, module, DATA[:3], method=method, progress=False).values.any()


def test_an_empty_batch_among_accumulated_ones_contributes_nothing(tmp_path):
    data = DataLoader(DATA, batch_sampler=WithEmptyBatch(), collate_fn=collate)
    recorder = GradientRecorder(tmp_path / "run", reduction="sum")
    trainer = quiet_trainer(recorder, accumulate_grad_batches=2)
    trainer.fit(Plain(mlp(), summed), data)
    run = HDF5Store.open(tmp_path / "run")
    assert [step.sample_ids.tolist() for step in run] == [[0, 1, 2], [3, 4, 5, 6]] * 2


class OfACopy(Plain):
    """Trains with the gradients of a copy, as meta-learning does, and returns no loss."""

    def training_step(self, batch, batch_idx):
        copied = copy.deepcopy(self.net)
        self.loss(copied(batch[0]), batch[1]).backward()
        for own, other in zip(self.net.parameters(), copied.parameters(), strict=True):
            own.grad = other.grad
        self.optimizers().step()


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
def test_steps_with_other_gradients_are_named():
    store, model = MemoryStore(), OfACopy(mlp())
    trainer = quiet_trainer(GradientRecorder(store), max_epochs=1)
    with pytest.warns(UserWarning, match=r"SGD took a step without a backward pass.*not recorded"):
        trainer.fit(model, DataLoader(DATA, batch_size=5))
    assert len(store) == 0


def test_steps_that_a_lost_device_still_holds_are_named(monkeypatch):
    def fail(steps):
        raise RuntimeError("the device is lost")

    expected = trained()[1]
    monkeypatch.setattr(StepsTogether, "flush", fail)
    with pytest.warns(UserWarning, match=r"last steps are not recorded: the device is lost"):
        _, weights = trained(GradientRecorder(MemoryStore(), snapshots=0))
    assert same_weights(weights, expected)


class FaultyIds:
    """Returns one id too few from some step on."""

    def __init__(self, step):
        self.step, self.calls = step, 0

    def __call__(self, batch):
        self.calls += 1
        ids = torch.arange(len(batch[0]))
        return ids if self.calls <= self.step else ids[:-1]


def train_long(*callbacks, max_epochs=20, data=None, save=None, resume=None):
    torch.manual_seed(0)
    model = Plain(mlp())
    trainer = quiet_trainer(*callbacks, max_epochs=max_epochs)
    data = loader(vectors(15), 5) if data is None else data
    trainer.fit(model, data, ckpt_path=resume)
    if save is not None:
        trainer.save_checkpoint(save)
    return trainer.global_step, {k: v.clone() for k, v in model.state_dict().items()}


def test_an_error_ends_the_training_early_and_the_recording_late(tmp_path):
    early = GradientRecorder(tmp_path / "early", sample_ids=FaultyIds(3))
    with pytest.raises(ValueError, match="returned 4 ids for a batch"):
        train_long(early)
    late = GradientRecorder(tmp_path / "late", sample_ids=FaultyIds(31))
    with pytest.warns(UserWarning, match="recording has stopped at step 31: .* 4 ids for a batch"):
        steps, weights = train_long(late)
    expected_steps, expected = train_long()
    assert steps == expected_steps == 60
    assert same_weights(weights, expected)
    run = HDF5Store.open(tmp_path / "late")
    assert [step.index for step in run] == [*range(31)]
    assert run.final_fingerprint is None


def test_a_run_that_is_continued_after_recording_had_stopped_says_so(tmp_path):
    checkpoint = tmp_path / "last.ckpt"
    stopped = GradientRecorder(tmp_path / "run", sample_ids=FaultyIds(31))
    with pytest.warns(UserWarning, match="recording has stopped at step 31"):
        train_long(stopped, save=checkpoint)
    again = GradientRecorder(tmp_path / "run", sample_ids=FaultyIds(100))
    with pytest.warns(UserWarning, match="had stopped before step 60; the steps from"):
        train_long(again, max_epochs=22, resume=checkpoint)
    run = HDF5Store.open(tmp_path / "run")
    assert [step.index for step in run] == [*range(31), *range(60, 66)]


class Stream(IterableDataset):
    def __iter__(self):
        return iter(vectors(15))


class ChangingLoader(Plain):
    """Trains on a stream, whose ids are unknown, after some epochs."""

    def train_dataloader(self):
        is_late = self.trainer.current_epoch >= 9
        return loader(Stream(), 5, shuffle=False) if is_late else loader(vectors(15), 5)


def test_a_stream_that_begins_late_ends_the_recording_only(tmp_path):
    recorder = GradientRecorder(tmp_path / "run")
    trainer = quiet_trainer(recorder, max_epochs=12, reload_dataloaders_every_n_epochs=1)
    with pytest.warns(UserWarning, match="recording has stopped at step 27: .* iterable dataset"):
        trainer.fit(ChangingLoader(mlp()))
    assert trainer.global_step == 36
    assert [step.index for step in HDF5Store.open(tmp_path / "run")] == [*range(27)]


def test_a_resumed_training_with_a_stream_is_refused_at_once(tmp_path):
    checkpoint = tmp_path / "last.ckpt"
    recorder = GradientRecorder(tmp_path / "run")
    train_long(recorder, save=checkpoint)
    stream = loader(Stream(), 5, shuffle=False)
    for again in (recorder, GradientRecorder(tmp_path / "run")):
        with pytest.raises(ValueError, match="iterable dataset, whose samples have no"):
            train_long(again, max_epochs=22, data=stream, resume=checkpoint)
