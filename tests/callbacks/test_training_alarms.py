"""Alarms during training: what is planted in the data or their order is found and logged."""

from dataclasses import replace

import pytest
import torch
from lightning_models import Plain, TrainingLog, loader, mlp, quiet_trainer, vectors
from pytorch_lightning.loggers import Logger
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from tda_lightning import GradientRecorder, LossRecorder
from tda_lightning.callbacks import TrainingAlarms
from tda_lightning.results.alarms import find_alarms
from tda_lightning.stores import MemoryStore

N, WRONG = 53, 17


class Curves(Logger):
    """Stores all logged numbers."""

    def __init__(self):
        super().__init__()
        self.logged = []

    name, version = "curves", 0

    def log_metrics(self, metrics, step=None):
        if any(name.startswith("alarms/") for name in metrics):
            self.logged.append(metrics)

    def log_hyperparams(self, *args, **kwargs):
        pass


def separable():
    """Return two clear classes, in which one label is wrong."""
    generator = torch.Generator().manual_seed(1)
    y = torch.arange(N) % 2
    x = torch.randn(N, 3, generator=generator) * 0.3 + torch.where(y == 1, 2.0, -2.0)[:, None]
    y[WRONG] = 1 - y[WRONG]
    return TensorDataset(x, y)


def fit(data_loader, epochs=5, net=None, kind=GradientRecorder, **settings):
    recorder, curves = kind(MemoryStore()), Curves()
    alarms = TrainingAlarms(recorder)
    trainer = quiet_trainer(recorder, alarms, max_epochs=epochs, logger=curves, **settings)
    trainer.fit(Plain(net or nn.Linear(3, 2)), data_loader)
    return alarms.alarms, curves.logged, recorder.store


@pytest.mark.parametrize("kind", [GradientRecorder, LossRecorder])
def test_every_step_of_the_epochs_so_far_is_examined(kind):
    sizes = []

    class Reading(TrainingAlarms):
        def on_train_epoch_end(self, *arguments):
            super().on_train_epoch_end(*arguments)
            sizes.append(len(self.recorder.store))

    recorder = kind(MemoryStore())
    trainer = quiet_trainer(recorder, Reading(recorder), max_epochs=3)
    trainer.fit(Plain(nn.Linear(3, 2)), loader(separable()))
    steps = -(-N // 5)
    assert sizes == [steps, 2 * steps, 3 * steps]


@pytest.mark.parametrize("kind", [GradientRecorder, LossRecorder])
def test_a_wrong_label_is_suspected_logged_and_listed(caplog, kind):
    alarms, logged, _ = fit(loader(separable()), kind=kind)
    assert "suspected_mislabels, 1 samples" in caplog.text
    (alarm,) = alarms.raised
    assert alarm.ids.tolist() == [WRONG]
    counts = [metrics["alarms/suspected_mislabels"] for metrics in logged]
    assert counts[0] == 0  # before the third visit
    assert counts[-1] == 1
    no_rows = ("large contributions: the run holds no rows",)
    assert alarms.not_checked == (no_rows if kind is LossRecorder else ())


def test_a_training_without_faults_raises_nothing():
    data = separable()
    data.tensors[1][WRONG] = 1 - data.tensors[1][WRONG]
    alarms, logged, _ = fit(loader(data))
    assert not alarms.raised
    assert "none raised" in repr(alarms)
    assert len(logged) == 5
    assert all(value == 0 for metrics in logged for value in metrics.values())


def test_unseen_samples_and_repeated_orders_are_named():
    alarms, _, _ = fit(DataLoader(vectors(13, 3, 2), 5), epochs=3, limit_train_batches=2)
    by_name = {alarm.name: alarm for alarm in alarms.raised}
    assert by_name["never_seen"].ids.tolist() == [10, 11, 12]
    assert "same order" in by_name["order_faults"].reason


def test_a_contribution_above_all_earlier_epochs_is_large():
    _, _, store = fit(loader(separable()), epochs=2)
    changed = MemoryStore()
    changed.begin(store.recipe)
    last = len(store) - 1
    for position, step in enumerate(store):
        rows = step.sketch.clone()
        if position == last:
            rows[0] *= 1e6
        changed.append(replace(step, sketch=rows))
    (alarm,) = (a for a in find_alarms(changed).raised if a.name == "large_contributions")
    assert alarm.ids.tolist() == [int(store[last].sample_ids[0])]
    assert "large_contributions" not in {a.name for a in find_alarms(store).raised}


def test_what_cannot_be_checked_is_named():
    store = MemoryStore()
    data = TensorDataset(torch.randn(11, 3), torch.randn(11, 1))
    recorder = GradientRecorder(store, every_n_steps=2)
    quiet_trainer(recorder).fit(Plain(nn.Linear(3, 1), nn.functional.mse_loss), loader(data))
    missing = " ".join(find_alarms(store).not_checked)
    assert "one of every 2 steps" in missing
    assert "not a known cross-entropy" in missing
    assert "no steps yet" in repr(find_alarms(store[:0]))


@pytest.mark.parametrize(
    ("epochs", "spread", "reason"),
    [
        (2, 1.0, "labels: no sample came 3 times yet"),
        (3, 0.0, "labels: the model does not fit half of the labels yet"),
        (1, 1.0, "large contributions: there is only one epoch"),
    ],
)
def test_checks_that_come_too_early_are_named(epochs, spread, reason):
    x, y = separable().tensors
    alarms, _, _ = fit(loader(TensorDataset(spread * x, y)), epochs=epochs)
    assert reason in repr(alarms)


def test_a_run_without_rows_names_what_it_cannot_check():
    store = MemoryStore()
    quiet_trainer(LossRecorder(store), max_epochs=5).fit(
        Plain(nn.Linear(3, 2)), loader(separable())
    )
    alarms = find_alarms(store)
    assert [alarm.ids.tolist() for alarm in alarms.raised] == [[WRONG]]
    assert alarms.not_checked == ("large contributions: the run holds no rows",)


def test_weights_are_those_without_the_callback():
    def weights(*callbacks):
        torch.manual_seed(2)
        model = Plain(mlp())
        torch.manual_seed(2)
        quiet_trainer(*callbacks).fit(model, loader(vectors()))
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    recorder = GradientRecorder(MemoryStore())
    assert torch.equal(weights(), weights(recorder, TrainingAlarms(recorder), TrainingLog()))


def test_a_recorder_of_another_trainer_is_refused():
    recorder = GradientRecorder(MemoryStore())
    with pytest.raises(ValueError, match="is not among the callbacks"):
        quiet_trainer(TrainingAlarms(recorder)).fit(Plain(mlp()), loader(vectors()))


class MostlyHardest(Plain):
    """Drops the easiest two samples of each batch from its loss."""

    def training_step(self, batch, batch_idx):
        losses = nn.functional.cross_entropy(self.net(batch[0]), batch[1], reduction="none")
        return losses.topk(len(losses) - 2).values.mean()


def test_samples_that_a_step_drops_are_not_suspected():
    store = MemoryStore()
    torch.manual_seed(0)
    model = MostlyHardest(nn.Linear(3, 2))
    quiet_trainer(GradientRecorder(store), max_epochs=9).fit(model, loader(separable()))
    curvature = torch.cat([step.curvature for step in store.facts])
    assert (curvature == 0).sum() == 9 * 2 * -(-N // 5)
    (alarm,) = find_alarms(store).raised
    assert alarm.ids.tolist() == [WRONG]
