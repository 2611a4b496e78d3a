"""The loss recorder records the same losses and order as the gradient recorder, and no rows."""

import pytest
import torch
from lightning_models import Plain, loader, mlp, quiet_trainer, vectors

from tda_lightning import GradientRecorder, LossRecorder, record_queries, self_influence
from tda_lightning.applications import (
    GraNd,
    coreset,
    find_mislabeled,
    loss_history,
    prune,
    unlearn,
)
from tda_lightning.stores import HDF5Store, MemoryStore
from tda_lightning.stores.integrity.writer_lock import LOCK


def trained(*callbacks, epochs=3, **settings):
    torch.manual_seed(0)
    model = Plain(mlp())
    quiet_trainer(*callbacks, max_epochs=epochs, **settings).fit(model, loader(vectors()))
    return model


@pytest.mark.parametrize("accumulated", [1, 2])
@pytest.mark.parametrize(
    "epochs",
    [3, pytest.param(50, marks=pytest.mark.slow)],
    ids=["steps of one computation", "of several"],
)
def test_losses_and_order_are_those_of_the_gradient_recorder(accumulated, epochs):
    losses, rows = MemoryStore(), MemoryStore()
    settings = {"accumulate_grad_batches": accumulated, "epochs": epochs}
    trained(LossRecorder(losses), **settings)
    trained(GradientRecorder(rows), **settings)
    ours, theirs = loss_history(losses), loss_history(rows)
    assert len(losses) == len(rows)
    assert torch.equal(ours.sample_ids, theirs.sample_ids)
    assert torch.equal(ours.steps, theirs.steps)
    torch.testing.assert_close(ours.losses, theirs.losses)
    for one, other in zip(losses, rows, strict=True):
        torch.testing.assert_close(one.weights, other.weights)


def test_steps_before_a_failure_are_recorded():
    class Failing(Plain):
        def on_train_batch_end(self, *_):
            if self.global_step == 5:
                raise RuntimeError("failed")

    store = MemoryStore()
    with pytest.raises(RuntimeError, match="failed"):
        quiet_trainer(LossRecorder(store), max_epochs=3).fit(Failing(mlp()), loader(vectors()))
    assert [step.index for step in store] == list(range(5))


@pytest.mark.parametrize("at", range(9))
@pytest.mark.parametrize(
    "new",
    [lambda store: GradientRecorder(store, snapshots=0), LossRecorder],
    ids=["gradients", "losses"],
)
def test_an_interrupt_while_steps_are_written_leaves_no_gap(new, at, monkeypatch):
    """The interrupted training is closed, which writes what waits; no step follows a lost one."""
    monkeypatch.setattr("tda_lightning.recording.taken_step._SECONDS_TOGETHER", float("inf"))
    recorder = new(MemoryStore())
    append, calls = recorder._writer.append, iter(range(100))

    def interrupted(step):
        if next(calls) == at:
            raise ValueError("interrupted")
        append(step)

    monkeypatch.setattr(recorder._writer, "append", interrupted)
    trainer = quiet_trainer(recorder, max_epochs=3)
    with pytest.raises(ValueError, match="interrupted"):
        trainer.fit(Plain(mlp()), loader(vectors()))
    assert [step.index for step in recorder.store] == list(range(at))


@pytest.mark.parametrize("recorder", [GradientRecorder, LossRecorder])
def test_slow_steps_do_not_wait_for_others(recorder, monkeypatch):
    """Others can read the run meanwhile."""
    monkeypatch.setattr("tda_lightning.recording.taken_step._SECONDS_TOGETHER", 0.0)
    store, seen = MemoryStore(), []

    class Reading(Plain):
        def on_train_batch_end(self, *_):
            seen.append(len(store))

    quiet_trainer(recorder(store), max_epochs=3).fit(Reading(mlp()), loader(vectors()))
    assert seen == list(range(1, 10))


def test_the_training_is_unchanged():
    expected, recorded = trained(), trained(LossRecorder(MemoryStore()))
    for one, other in zip(expected.parameters(), recorded.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_run_on_disk_continues_from_a_checkpoint(tmp_path):
    torch.manual_seed(0)
    model, store = Plain(mlp()), tmp_path / "run.tda"
    first = quiet_trainer(LossRecorder(store), max_epochs=1)
    first.fit(model, loader(vectors()))
    first.save_checkpoint(tmp_path / "one.ckpt")
    second = quiet_trainer(LossRecorder(store), max_epochs=3)
    second.fit(model, loader(vectors()), ckpt_path=tmp_path / "one.ckpt", weights_only=False)
    run = HDF5Store.open(store)
    assert [facts.index for facts in run.facts] == list(range(9))
    assert loss_history(store).sample_ids.tolist() == sorted(3 * list(range(13)))


@pytest.mark.filterwarnings("ignore:Be aware that when using .ckpt_path.")
def test_a_moved_run_continues_from_a_checkpoint(tmp_path):
    """The state of the run is found by its id, not by its path; another run is refused."""
    torch.manual_seed(0)
    model = Plain(mlp())
    for name in ("first", "other"):
        trainer = quiet_trainer(LossRecorder(tmp_path / name), max_epochs=1)
        trainer.fit(model, loader(vectors()))
        trainer.save_checkpoint(tmp_path / f"{name}.ckpt")
    (tmp_path / "first").rename(tmp_path / "moved")

    def resumed(name):
        trainer = quiet_trainer(LossRecorder(tmp_path / name), max_epochs=2)
        checkpoint = tmp_path / "first.ckpt"
        trainer.fit(model, loader(vectors()), ckpt_path=checkpoint, weights_only=False)

    with pytest.raises(FileExistsError, match="belongs to another recorded run"):
        resumed("other")
    resumed("moved")
    assert [facts.index for facts in HDF5Store.open(tmp_path / "moved").facts] == list(range(6))


def test_runs_are_numbered_and_a_fast_dev_run_leaves_nothing(tmp_path):
    recorder = LossRecorder(tmp_path / "run.tda", existing="number")
    trained(recorder, epochs=1, fast_dev_run=True)
    assert not any(tmp_path.iterdir())
    for name in ("run.tda", "run-2.tda"):
        trained(recorder, epochs=1)
        assert recorder.store.path == tmp_path / name
    trained(LossRecorder(), epochs=1, default_root_dir=tmp_path / "logs")
    runs = [tmp_path / "run.tda", tmp_path / "run-2.tda", tmp_path / "logs" / "run.tda"]
    assert [len(HDF5Store.open(run)) for run in runs] == [3, 3, 3]


def test_other_processes_may_write_once_the_training_has_ended(tmp_path):
    trained(LossRecorder(tmp_path / "run"), epochs=1)
    assert not (tmp_path / "run" / LOCK).exists()


def test_mislabels_are_found_and_attribution_is_refused():
    store = MemoryStore()
    trained(LossRecorder(store))
    assert list(find_mislabeled(store).witnesses) == ["loss"]
    with pytest.raises(ValueError, match="losses and no rows"):
        self_influence(store)


@pytest.mark.parametrize(
    "answer",
    [
        lambda store, model, data: coreset(store, 0.5),
        lambda store, model, data: prune(store, importance=GraNd()),
        lambda store, model, data: record_queries(model, vectors()[:3], like=store),
        lambda store, model, data: unlearn(model, store, data, [3]),
    ],
    ids=["coreset", "GraNd", "record_queries", "unlearn"],
)
def test_answers_from_rows_are_refused(answer):
    """Rows without columns are all alike, so that any answer would seem to be one."""
    store, model = MemoryStore(), Plain(mlp())
    quiet_trainer(LossRecorder(store)).fit(model, loader(vectors()))
    with pytest.raises(ValueError, match="holds losses and no rows"):
        answer(store, model, loader(vectors()))


def test_manual_optimization_is_refused():
    model = Plain(mlp())
    model.automatic_optimization = False
    with pytest.raises(ValueError, match="expected automatic optimization"):
        quiet_trainer(LossRecorder(MemoryStore())).fit(model, loader(vectors()))
