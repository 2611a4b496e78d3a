"""The losses of all visits are those that the training computed."""

from dataclasses import replace

import pytest
import torch
from lightning_models import Plain, loader, mlp, quiet_trainer, vectors
from torch.nn import functional
from torch.utils.data import TensorDataset

from tda_lightning import GradientRecorder
from tda_lightning.applications import loss_history
from tda_lightning.stores import MemoryStore


class LossLog(Plain):
    """Log the loss of each sample of each batch."""

    def __init__(self, loss):
        super().__init__(mlp(), loss)
        self.logged = []

    def training_step(self, batch, batch_idx):
        with torch.no_grad():
            self.logged.append(self.loss(self.net(batch[0]), batch[1], reduction="none"))
        return super().training_step(batch, batch_idx)


def squared_error(outputs, targets, reduction="mean"):
    return functional.mse_loss(outputs[:, 0], targets, reduction=reduction)


def regression():
    x, _ = vectors().tensors
    return TensorDataset(x, x.sum(dim=1))


@pytest.mark.parametrize(
    ("loss", "data"),
    [(functional.cross_entropy, vectors()), (squared_error, regression())],
    ids=["cross-entropy", "squared error"],
)
def test_losses_are_those_of_the_training(loss, data):
    store, model = MemoryStore(), LossLog(loss)
    quiet_trainer(GradientRecorder(store), max_epochs=3).fit(model, loader(data))
    history = loss_history(store)
    expected = {
        (int(sample), step.index): float(value)
        for step, values in zip(store, model.logged, strict=True)
        for sample, value in zip(step.sample_ids, values, strict=True)
    }
    pairs = zip(history.sample_ids.tolist(), history.steps.tolist(), strict=True)
    losses = [expected[pair] for pair in pairs]
    assert len(losses) == 3 * 13
    torch.testing.assert_close(history.losses, torch.tensor(losses).double(), rtol=1e-4, atol=1e-6)


def recorded():
    store = MemoryStore()
    quiet_trainer(GradientRecorder(store), max_epochs=5).fit(Plain(mlp()), loader(vectors()))
    return store


def test_summaries_follow_their_definitions():
    history = loss_history(recorded())
    frame = history.to_pandas()
    groups = frame.groupby("sample").loss
    assert history.mean().values.tolist() == pytest.approx(groups.mean().tolist())
    assert history.last().values.tolist() == pytest.approx(groups.last().tolist())
    p = torch.exp(-history.losses).reshape(13, 5)
    assert history.confidence().values.tolist() == pytest.approx(p.mean(dim=1).tolist())
    deviations = p.std(dim=1, unbiased=False).tolist()
    assert history.variability().values.tolist() == pytest.approx(deviations)
    learned = torch.tensor(frame.margin.to_numpy()).reshape(13, 5) > 0
    shares = learned.double().mean(dim=1).tolist()
    assert history.correctness().values.tolist() == pytest.approx(shares)
    events = (learned[:, :-1] & ~learned[:, 1:]).sum(dim=1)
    assert history.forgetting().values.tolist() == events.tolist()
    hardest = groups.mean().sort_values(ascending=False).index[:3]
    assert history.hardest(3).tolist() == hardest.tolist()
    assert "65 visits of 13 samples (cross-entropy)" in repr(history)


def test_samples_without_a_visit_have_no_loss_and_are_last():
    history = loss_history(recorded()[:1])
    assert history.mean().values.isnan().sum() == 13 - 5
    assert set(history.hardest(5).tolist()) == set(history.sample_ids.tolist())


def earlier(store):
    """Return the run as earlier versions recorded it, without losses and margins."""
    run = MemoryStore()
    run.begin(store.recipe)
    for step in store:
        run.append(replace(step, losses=None, errors=None, margins=None))
    return run


def test_losses_of_earlier_versions_come_from_the_curvature():
    run = recorded()
    derived = loss_history(earlier(run))
    torch.testing.assert_close(derived.losses, loss_history(run).losses, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="holds no margins"):
        derived.forgetting()


class Tokens(Plain):
    """A classifier of sequences of two tokens, of which some labels are ignored."""

    def training_step(self, batch, batch_idx):
        logits = torch.stack([self.net(batch[0]), self.net(-batch[0])], dim=2)
        labels = torch.stack([batch[1], torch.where(batch[1] == 0, -100, batch[1])], dim=1)
        return functional.cross_entropy(logits, labels)


def test_losses_of_several_terms_are_their_means():
    store, model = MemoryStore(), Tokens(mlp(), optimizer=lambda p: torch.optim.SGD(p, lr=0.0))
    quiet_trainer(GradientRecorder(store), max_epochs=1).fit(model, loader(vectors()))
    x, y = vectors().tensors
    with torch.no_grad():
        first, second = (
            functional.cross_entropy(model.net(s * x), y, reduction="none") for s in (1, -1)
        )
    expected = torch.where(y == 0, first, (first + second) / 2).double()
    history = loss_history(store)
    torch.testing.assert_close(history.losses, expected, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="holds no margins"):
        history.correctness()
    run = earlier(store)
    with pytest.raises(ValueError, match="no losses of several terms"):
        loss_history(run)


def test_losses_that_are_not_finite_are_left_out_of_means():
    history = loss_history(recorded())
    losses = history.losses.clone()
    losses[[0, 5, 6, 7, 8, 9]] = torch.nan  # A visit of the first sample, all of the second.
    broken = replace(history, losses=losses)
    assert broken.mean().values[0] == pytest.approx(float(losses[1:5].mean()))
    assert broken.mean().values.isnan().nonzero().tolist() == [[1]]
    assert broken.hardest(13)[-1] == 1
    assert "6 visits have no loss" in repr(broken)
