"""The losses of all visits are those that the training computed."""

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
    assert history.error().values.tolist() == pytest.approx((1 - p).mean(dim=1).tolist())
    learned = p > 0.5
    events = (learned[:, :-1] & ~learned[:, 1:]).sum(dim=1)
    assert history.forgetting().values.tolist() == events.tolist()
    hardest = groups.mean().sort_values(ascending=False).index[:3]
    assert history.hardest(3).tolist() == hardest.tolist()
    assert "65 visits of 13 samples (cross-entropy)" in repr(history)


def test_samples_without_a_visit_have_no_loss_and_are_last():
    history = loss_history(recorded()[:1])
    assert history.mean().values.isnan().sum() == 13 - 5
    assert set(history.hardest(5).tolist()) == set(history.sample_ids.tolist())


def test_losses_of_several_terms_are_refused():
    class Tokens(Plain):
        def training_step(self, batch, batch_idx):
            logits = self.net(batch[0])[:, :, None].expand(-1, -1, 2)
            return functional.cross_entropy(logits, batch[1][:, None].expand(-1, 2))

    store = MemoryStore()
    quiet_trainer(GradientRecorder(store), max_epochs=1).fit(Tokens(mlp()), loader(vectors()))
    with pytest.raises(ValueError, match="averages several terms"):
        loss_history(store)
