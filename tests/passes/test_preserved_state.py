"""In a query, the training step meets the state of a training, and leaves none behind."""

from collections import deque

import pytest
import pytorch_lightning as pl
import torch
from lightning_models import Plain, loader, mlp, quiet_trainer, vectors
from pytorch_lightning.trainer.states import RunningStage

from tda_lightning import ContributionTracker, GradientRecorder, TracIn, attribute
from tda_lightning.passes.model_state import preserved_rng
from tda_lightning.passes.queries import record_queries
from tda_lightning.stores import MemoryStore


class StageDependent(Plain):
    """Returns a loss only while its trainer trains, as forecasting libraries do."""

    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) if self.trainer.training else None


class Counting(Plain):
    """Counts its steps and collects their losses, as an epoch's summary needs them."""

    def __init__(self, net):
        super().__init__(net)
        self.steps, self.losses = 0, []

    def training_step(self, batch, batch_idx):
        self.steps += 1
        loss = super().training_step(batch, batch_idx)
        self.losses.append(loss.detach())
        return loss


class AskedInValidation(pl.Callback):
    """Queries the run in the middle of training."""

    def __init__(self, store):
        self.store, self.stages, self.answers = store, [], []

    def on_validation_end(self, trainer, pl_module):
        rows = record_queries(pl_module, vectors()[:3], like=self.store, at="model")
        self.answers.append(rows)
        self.stages.append(trainer.state.stage)


def trained(model):
    store = MemoryStore()
    quiet_trainer(GradientRecorder(store)).fit(model, loader(vectors()), loader(vectors()))
    return store


class Validated(StageDependent):
    def validation_step(self, batch, batch_idx):
        pass


def test_a_step_that_returns_a_loss_only_in_training_can_be_queried():
    model = Validated(mlp())
    store = trained(model)
    stage = model.trainer.state.stage
    assert attribute(store, model, vectors()[:3], progress=False).values.any()
    assert model.trainer.state.stage == stage


def test_a_query_in_validation_leaves_the_trainer_validating():
    model = Validated(mlp())
    callback = AskedInValidation(trained(model))
    trainer = quiet_trainer(callback, num_sanity_val_steps=0)
    trainer.fit(model, loader(vectors()), loader(vectors()))
    assert callback.stages == [RunningStage.VALIDATING] * 2
    assert all(rows.any() for rows in callback.answers)


def test_a_loaded_model_with_a_new_trainer_can_be_queried():
    model, loaded = Validated(mlp()), Validated(mlp())
    store = trained(model)
    loaded.load_state_dict(model.state_dict())
    loaded.trainer = pl.Trainer(logger=False, accelerator="cpu")
    assert attribute(store, loaded, vectors()[:3], progress=False).values.any()


@pytest.mark.filterwarnings("ignore:You passed in a .val_dataloader. but have no")
def test_counters_and_lists_of_outputs_are_restored_after_queries():
    model = Counting(mlp())
    store = trained(model)
    losses, steps, contents = model.losses, model.steps, list(model.losses)
    attribute(store, model, vectors()[:3], progress=False)
    assert model.steps == steps == len(store)
    assert model.losses is losses
    assert all(a is b for a, b in zip(losses, contents, strict=True))


class WithMemory(Plain):
    """Keeps what it has seen, in all places where a module can keep it."""

    def __init__(self):
        super().__init__(mlp())
        self.register_buffer("queue", torch.zeros(11, 3))
        self.table, self.recent = torch.zeros(11, 3), deque(maxlen=3)
        self.by_step, self.calls = {}, 0

    def training_step(self, batch, batch_idx):
        outputs = self.net(batch[0])
        seen = outputs.detach()
        self.calls += 1
        self.table[: len(seen)] = seen
        self.recent.append(seen.mean())
        self.by_step[self.calls] = seen.mean()
        memory = self.queue.mean() + self.table.mean() + sum(self.recent)
        self.queue = torch.cat([seen, self.queue])[:11]
        self.seen = sum(self.by_step.values())
        return self.loss(outputs * memory, batch[1]) + 0 * self.seen

    def state(self):
        recent, by_step = list(self.recent), dict(self.by_step)
        return [self.queue.clone(), self.table.clone(), recent, by_step, self.calls, self.seen]


def test_memories_of_a_model_are_restored_after_queries():
    model = WithMemory()
    store = MemoryStore()
    quiet_trainer(GradientRecorder(store)).fit(model, loader(vectors()))
    before, queue = model.state(), model.queue
    for _ in range(2):
        attribute(store, model, vectors()[:3], method=TracIn(), progress=False)
        torch.testing.assert_close(model.state(), before, rtol=0, atol=0)
        assert model.queue is queue


def test_a_model_with_memories_is_trained_alike_with_a_probe(tmp_path):
    states = []
    for callbacks in ([], [ContributionTracker(vectors()[:5], tmp_path / "probe.npz")]):
        torch.manual_seed(0)
        model = WithMemory()
        torch.manual_seed(1)
        quiet_trainer(*callbacks).fit(model, loader(vectors()))
        states.append([*model.state(), *model.parameters()])
    torch.testing.assert_close(*states, rtol=0, atol=0)


class OtherOutputs(Plain):
    """Returns the losses of a batch in training and its predictions otherwise, as detectors do."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        outputs = {"loss": loss} if self.net.training else [loss]
        return outputs.get("loss")


@pytest.mark.filterwarnings("ignore:You passed in a .val_dataloader. but have no")
def test_a_model_with_other_outputs_in_evaluation_can_be_queried_in_training_mode():
    model = OtherOutputs(mlp())
    store = trained(model)
    with pytest.raises(ValueError, match=r'no attribute .get.*pass `mode="train"`'):
        attribute(store, model, vectors()[:3], progress=False)
    scores = attribute(store, model, vectors()[:3], mode="train", progress=False)
    assert scores.values.any()


class LogsByHand(Plain):
    """Logs by its logger, without ``self.log``."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.logger.log_metrics({"by_hand": float(loss.detach())}, self.global_step)
        self.logger.experiment.add_scalar("by_hand", float(loss.detach()))
        assert self.logger.save_dir
        return loss


class KeepsRows(pl.loggers.CSVLogger):
    """Keeps what it is given."""

    def __init__(self, folder):
        super().__init__(folder)
        self.rows, self.experiment_rows = [], []

    @property
    def experiment(self):
        rows = self.experiment_rows
        return type("Writer", (), {"add_scalar": lambda self, *values: rows.append(values)})()

    def log_metrics(self, metrics, step=None):
        self.rows.append(metrics)

    def save(self):
        pass


def test_a_query_writes_nothing_to_the_logs_of_the_training(tmp_path):
    logger, store, model = KeepsRows(tmp_path), MemoryStore(), LogsByHand(mlp())
    trainer = quiet_trainer(GradientRecorder(store), logger=logger, max_epochs=1)
    trainer.fit(model, loader(vectors()))
    written = len(logger.rows), len(logger.experiment_rows)
    assert min(written) > 0
    attribute(store, model, vectors(5).tensors, progress=False)
    assert (len(logger.rows), len(logger.experiment_rows)) == written
    assert trainer.loggers == [logger]


def test_a_logger_that_a_loaded_model_lacks_is_named(tmp_path):
    store, model = MemoryStore(), LogsByHand(mlp())
    trainer = quiet_trainer(GradientRecorder(store), logger=KeepsRows(tmp_path), max_epochs=1)
    trainer.fit(model, loader(vectors()))
    loaded = LogsByHand(mlp())
    loaded.load_state_dict(model.state_dict())
    with pytest.raises(ValueError, match=r"NoneType.*such as `self.logger`"):
        attribute(store, loaded, vectors(5).tensors, progress=False)


class Gpu:
    """Stands for the module of a kind of GPU, such as `torch.xpu`."""

    def __init__(self):
        self.states = {0: torch.tensor([3]), 1: torch.tensor([5])}

    def get_rng_state(self, device):
        return self.states[device.index].clone()

    def set_rng_state(self, state, device):
        self.states[device.index] = state


def test_the_random_states_of_gpus_are_restored(monkeypatch):
    gpu = Gpu()
    monkeypatch.setattr(torch, "xpu", gpu)
    with preserved_rng([torch.device("xpu", 1)]):
        gpu.states = {0: torch.tensor([7]), 1: torch.tensor([7])}
    assert gpu.states == {0: torch.tensor([7]), 1: torch.tensor([5])}
