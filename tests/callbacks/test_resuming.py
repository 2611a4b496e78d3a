"""An interrupted and resumed training records the same run as an uninterrupted one."""

import random

import pytest
import pytorch_lightning as pl
import torch
from lightning_models import IndexedVectors, Plain, loader, mlp, quiet_trainer, vectors
from pytorch_lightning.callbacks import ModelCheckpoint
from resumption import EpochSampler, InterruptAt, ResumeSampler
from torch.utils.data import DataLoader

from tda_lightning import GradientRecorder, HDF5Store
from tda_lightning.stores import MemoryStore
from tda_lightning.stores.contract import same

pytestmark = [
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    pytest.mark.filterwarnings("ignore:Be aware that when using .ckpt_path."),
]
SETTINGS = {"max_epochs": 4, "enable_checkpointing": True}


def train(folder, run, *, until=None, resume=None, each=3, every=1, **settings):
    pl.seed_everything(5, verbose=False)
    sampler = EpochSampler(13, 2)
    callbacks = [
        ModelCheckpoint(folder, every_n_train_steps=each, save_top_k=-1, filename="{step}"),
        GradientRecorder(run, every_n_steps=every),
        ResumeSampler(sampler),
    ]
    if until:
        callbacks.append(InterruptAt(until))
    trainer = quiet_trainer(*callbacks, **{**SETTINGS, **settings})
    model = Plain(mlp(), optimizer=lambda p: torch.optim.AdamW(p, lr=0.01))
    trainer.fit(
        model, DataLoader(IndexedVectors(), batch_size=2, sampler=sampler), ckpt_path=resume
    )
    return model


def assert_same_runs(run, expected):
    assert [step.index for step in run] == [step.index for step in expected]
    assert all(map(same, run, expected))


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({}, marks=pytest.mark.slow),
        {"accumulate_grad_batches": 2},
        pytest.param({"every": 2}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_five_interruptions_do_not_change_the_store(tmp_path, settings):
    settings = {"max_epochs": 6, **settings}
    whole = train(tmp_path / "a", tmp_path / "whole", **settings)
    total = 6 * (4 if "accumulate_grad_batches" in settings else 7)
    generator = random.Random(1)
    resume = None
    for save in sorted(generator.sample(range(1, total // 3), 5)):
        interruption = 3 * save + generator.choice([1, 2])
        with pytest.raises(RuntimeError, match="interrupted"):
            train(tmp_path / "b", tmp_path / "parts", until=interruption, resume=resume, **settings)
        resume = tmp_path / "b" / f"step={3 * save}.ckpt"
    parts = train(tmp_path / "b", tmp_path / "parts", resume=resume, **settings)
    for expected, weight in zip(whole.parameters(), parts.parameters(), strict=True):
        assert torch.equal(weight, expected)
    assert_same_runs(HDF5Store.open(tmp_path / "whole"), HDF5Store.open(tmp_path / "parts"))


def fit(recorder, *callbacks, data=None, resume=None, trainer=None, **settings):
    trainer = trainer or quiet_trainer(recorder, *callbacks, **{**SETTINGS, **settings})
    trainer.fit(Plain(mlp()), data or loader(IndexedVectors()), ckpt_path=resume)
    return trainer


def checkpoint_at(folder, recorder, step, **settings):
    saver = ModelCheckpoint(folder, every_n_train_steps=step, save_top_k=-1, filename="{step}")
    fit(recorder, saver, **settings)
    return folder / f"step={step}.ckpt"


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("first", [3, 4, 5], ids=["epoch end", "mid-epoch", "later"])
def test_ids_are_correct_if_the_order_changes_on_resumption(tmp_path, first, workers):
    """Lightning draws a new permutation after a resumption; the ids are those of its batches."""
    from lightning_models import TrainingLog

    path = checkpoint_at(tmp_path, GradientRecorder(tmp_path / "run"), first, max_epochs=2)
    log = TrainingLog()
    recorder = GradientRecorder(tmp_path / "run")
    data = loader(IndexedVectors(), num_workers=workers)
    fit(recorder, log, data=data, resume=path, enable_checkpointing=False)
    store = HDF5Store.open(tmp_path / "run")
    assert [step.index for step in store] == list(range(12))
    ids = [batch[0][:, 0].long().tolist() for batch in log.batches]
    assert [step.sample_ids.tolist() for step in store[first:]] == ids


def test_the_state_in_a_checkpoint_loads_with_weights_only(tmp_path):
    recorder = GradientRecorder(tmp_path / "run")
    path = checkpoint_at(tmp_path, recorder, 3)
    state = torch.load(path, weights_only=True)["callbacks"][recorder.state_key]
    run = {"run": recorder.store.run_id, "steps": 3, "has_stopped": False}
    assert state == {**run, "lanes": [{"taken": 3}]}


@pytest.mark.parametrize("strip", ["callbacks", "state"])
def test_a_checkpoint_without_recorder_state_resumes_at_its_step(tmp_path, strip):
    path = checkpoint_at(tmp_path, GradientRecorder(tmp_path / "run"), 6)
    checkpoint = torch.load(path, weights_only=False)
    checkpoint["callbacks"] = {}
    if strip == "callbacks":
        del checkpoint["callbacks"]
    torch.save(checkpoint, path)
    recorder = GradientRecorder(tmp_path / "run")
    with pytest.warns(UserWarning, match="does not name a recorded run; .* at step 6"):
        fit(recorder, resume=path, enable_checkpointing=False)
    assert [step.index for step in HDF5Store.open(tmp_path / "run")] == list(range(12))


def test_a_second_fit_continues_the_run(tmp_path):
    store = MemoryStore()
    recorder = GradientRecorder(store)
    model, data = Plain(mlp()), loader(IndexedVectors())
    trainer = quiet_trainer(recorder, max_epochs=1)
    trainer.fit(model, data)
    trainer.fit_loop.max_epochs = 3
    trainer.fit(model, data)
    assert [step.index for step in store] == list(range(9))
    assert [step.epoch for step in store] == [0] * 3 + [1] * 3 + [2] * 3


@pytest.mark.parametrize("existing", ["refuse", "replace"])
def test_a_new_training_does_not_continue_an_existing_run(tmp_path, existing):
    fit(GradientRecorder(tmp_path / "run"))
    recorder = GradientRecorder(tmp_path / "run", existing=existing)
    if existing == "refuse":
        with pytest.raises(FileExistsError, match="already holds a recorded run"):
            fit(recorder)
    else:
        fit(recorder, max_epochs=1)
    steps = 12 if existing == "refuse" else 3
    assert len(HDF5Store.open(tmp_path / "run")) == steps


def test_a_resumed_run_is_not_replaced(tmp_path):
    path = checkpoint_at(tmp_path, GradientRecorder(tmp_path / "run"), 6)
    recorder = GradientRecorder(tmp_path / "run", existing="replace")
    fit(recorder, resume=path, enable_checkpointing=False)
    assert len(HDF5Store.open(tmp_path / "run")) == 12


def test_another_recipe_is_refused(tmp_path):
    path = checkpoint_at(tmp_path, GradientRecorder(tmp_path / "run"), 6)
    recorder = GradientRecorder(tmp_path / "run", every_n_steps=2)
    with pytest.raises(ValueError, match="`every_n_steps` was 1 and is now 2") as raised:
        fit(recorder, resume=path, enable_checkpointing=False)
    assert "Restore them" in str(raised.value)
    assert len(HDF5Store.open(tmp_path / "run")) == 12


def test_the_checkpoint_of_another_run_is_refused(tmp_path):
    path = checkpoint_at(tmp_path / "a", GradientRecorder(MemoryStore()), 6)
    other = MemoryStore()
    fit(GradientRecorder(other))
    with pytest.raises(FileExistsError, match="belongs to another recorded run"):
        fit(GradientRecorder(other), resume=path, enable_checkpointing=False)
    assert len(other) == 12


@pytest.mark.parametrize("place", ["moved", "relative"])
def test_a_moved_store_resumes_with_its_state(tmp_path, monkeypatch, place):
    """The state belongs to the run, not to the path of its folder."""
    path = checkpoint_at(tmp_path, GradientRecorder(tmp_path / "run"), 6)
    (tmp_path / "run").rename(tmp_path / "elsewhere")
    monkeypatch.chdir(tmp_path)
    recorder = GradientRecorder("elsewhere" if place == "relative" else tmp_path / "elsewhere")
    HDF5Store(tmp_path / "elsewhere").resume(4)
    with pytest.warns(UserWarning, match="the store lacks 2 steps"):
        fit(recorder, resume=path, enable_checkpointing=False)
    assert [step.index for step in recorder.store] == [0, 1, 2, 3, *range(6, 12)]


def test_the_checkpoint_of_a_run_with_the_store_of_another_is_refused(tmp_path):
    path = checkpoint_at(tmp_path / "a", GradientRecorder(tmp_path / "a.tda"), 6)
    fit(GradientRecorder(tmp_path / "b.tda"))
    expected = read_indices(tmp_path / "b.tda")
    with (
        pytest.warns(UserWarning, match="callbacks used to create the checkpoint"),
        pytest.raises(FileExistsError, match="belongs to another recorded run"),
    ):
        fit(GradientRecorder(tmp_path / "b.tda"), resume=path, enable_checkpointing=False)
    assert read_indices(tmp_path / "b.tda") == expected


@pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint")
def test_a_checkpoint_that_names_the_path_resumes(tmp_path):
    """Earlier versions named the state by the path of the store."""
    path = checkpoint_at(tmp_path, GradientRecorder(tmp_path / "run"), 6)
    checkpoint = torch.load(path, weights_only=False)
    (key,) = (key for key in checkpoint["callbacks"] if key.startswith("GradientRecorder"))
    earlier = f"GradientRecorder{{'store': {str(tmp_path / 'run')!r}}}"
    checkpoint["callbacks"][earlier] = checkpoint["callbacks"].pop(key)
    torch.save(checkpoint, path)
    fit(GradientRecorder(tmp_path / "run"), resume=path, enable_checkpointing=False)
    assert read_indices(tmp_path / "run") == list(range(12))


def read_indices(path):
    return [step.index for step in HDF5Store.open(path)]


def test_unrecorded_steps_before_the_checkpoint_warn(tmp_path):
    path = checkpoint_at(tmp_path, GradientRecorder(MemoryStore()), 6)
    recorder = GradientRecorder(tmp_path / "run")
    with (
        pytest.warns(UserWarning, match="the 6 steps before this checkpoint are not in the store"),
        pytest.warns(UserWarning, match="callbacks used to create the checkpoint"),
    ):
        fit(recorder, resume=path, enable_checkpointing=False)
    assert [step.index for step in HDF5Store.open(tmp_path / "run")] == list(range(6, 12))


class Resumable(DataLoader):
    """A loader with a state, like torchdata's, which skips the batches it has yielded already."""

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass


def test_a_loader_with_a_state_needs_sample_ids(tmp_path):
    data = Resumable(vectors(), batch_size=5)
    path = checkpoint_at(tmp_path, GradientRecorder(tmp_path / "run"), 4, data=data)
    with pytest.raises(ValueError, match=r"resumed at batch 1 from its own state.*sample_ids="):
        fit(GradientRecorder(tmp_path / "run"), data=data, resume=path, enable_checkpointing=False)


def test_two_recorders_have_separate_states(tmp_path):
    first, second = GradientRecorder(tmp_path / "one"), GradientRecorder(tmp_path / "two")
    saver = ModelCheckpoint(tmp_path, every_n_train_steps=6, save_top_k=-1, filename="{step}")
    quiet_trainer(first, second, saver, **SETTINGS).fit(Plain(mlp()), loader(IndexedVectors()))
    path = tmp_path / "step=6.ckpt"
    first, second = GradientRecorder(tmp_path / "one"), GradientRecorder(tmp_path / "two")
    trainer, data = quiet_trainer(first, second, max_epochs=4), loader(IndexedVectors())
    before = data.batch_sampler
    trainer.fit(Plain(mlp()), data, ckpt_path=path)
    assert data.batch_sampler is before
    assert "process_dataloader" not in vars(trainer.strategy)
    assert_same_runs(HDF5Store.open(tmp_path / "one"), HDF5Store.open(tmp_path / "two"))
    assert len(HDF5Store.open(tmp_path / "one")) == 12
