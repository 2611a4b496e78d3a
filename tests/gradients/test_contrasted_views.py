"""Views of each sample, one below the other, have the rows of their sample in any loss."""

import pytest
import pytorch_lightning as pl
import torch
from lightning_models import quiet_trainer
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from tda_lightning import GradientRecorder, Identity
from tda_lightning.stores import MemoryStore

D = 7


def cross_entropy(features):
    similar = functional.normalize(features, dim=1)
    logits = similar @ similar.mT / 0.2 - 1e9 * torch.eye(len(features)).double()
    return functional.cross_entropy(logits, torch.arange(len(features)).roll(len(features) // 2))


def masked_logsumexp(features):
    similar = functional.cosine_similarity(features[:, None], features[None], dim=-1)
    is_self = torch.eye(len(features), dtype=torch.bool)
    similar = similar.masked_fill(is_self, -9e15) / 0.07
    positive = is_self.roll(len(features) // 2, 0)
    return (similar.logsumexp(dim=-1) - similar[positive]).mean()


def supervised(features, count):
    """Attract all views of a sample (Khosla et al. 2020)."""
    similar = functional.normalize(features, dim=1)
    is_self = torch.eye(len(features), dtype=torch.bool)
    log_p = (similar @ similar.mT / 0.3).masked_fill(is_self, -1e9).log_softmax(dim=1)
    samples = torch.arange(len(features) // count).repeat(count)
    is_positive = (samples == samples[:, None]) & ~is_self
    return -log_p[is_positive].mean()


class Contrast(pl.LightningModule):
    def __init__(self, loss, norm):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(D, 16), norm(16), nn.ReLU(), nn.Linear(16, 4)).double()
        self.loss = loss

    def training_step(self, batch, batch_idx):
        features = self.net(torch.cat(batch))
        loss = self.loss(features)
        (self.gradient,) = torch.autograd.grad(loss, features, retain_graph=True)
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.filterwarnings("ignore:.*not among .layers.")
@pytest.mark.parametrize("loss", [cross_entropy, masked_logsumexp])
@pytest.mark.parametrize("norm", [nn.Identity, nn.BatchNorm1d])
@pytest.mark.parametrize("noise", [0.1, 1.0])
@pytest.mark.parametrize("n", [8, 11, 16])
def test_rows_of_both_views_belong_to_their_sample(n, noise, norm, loss):
    """Views that resemble each other hardly attract each other, so the loss does not show them."""
    generator = torch.Generator().manual_seed(n)
    x, noises = torch.randn(2, n, D, generator=generator, dtype=torch.float64)
    model, store = Contrast(loss, norm), MemoryStore()
    recorder = GradientRecorder(store, projector=Identity(), layers=["net.3.bias"])
    data = TensorDataset(x, x + noise * noises)
    quiet_trainer(recorder, max_epochs=1).fit(model, DataLoader(data, batch_size=n))
    torch.testing.assert_close(store[0].sketch, model.gradient[:n] + model.gradient[n:])


class Crops(Contrast):
    """Draws the views in the step, and joins them with the views of a sample apart or together."""

    def __init__(self, count, norm, are_apart):
        super().__init__(lambda features: supervised(features, count), norm)
        self.count, self.are_apart = count, are_apart

    def training_step(self, batch, batch_idx):
        views = [batch[0] + torch.randn_like(batch[0]) for _ in range(self.count)]
        joined = torch.cat(views) if self.are_apart else torch.stack(views, dim=1).flatten(0, 1)
        features = self.net(joined)
        if not self.are_apart:
            features = features.unflatten(0, (-1, self.count)).transpose(0, 1).flatten(0, 1)
        loss = self.loss(features)
        (gradient,) = torch.autograd.grad(loss, features, retain_graph=True)
        self.gradient = gradient.unflatten(0, (self.count, -1)).sum(dim=0)
        return loss


@pytest.mark.filterwarnings("ignore:.*not among .layers.")
@pytest.mark.parametrize("count", [2, 3, 4, 5])
@pytest.mark.parametrize("norm", [nn.Identity, nn.BatchNorm1d])
@pytest.mark.parametrize("are_apart", [True, False], ids=["one below the other", "together"])
def test_rows_of_several_views_belong_to_their_sample(count, norm, are_apart):
    x = torch.randn(11, D, generator=torch.Generator().manual_seed(count), dtype=torch.float64)
    model, store = Crops(count, norm, are_apart), MemoryStore()
    recorder = GradientRecorder(store, projector=Identity(), layers=["net.3.bias"])
    batches = DataLoader(TensorDataset(x), batch_size=8)
    quiet_trainer(recorder, max_epochs=1).fit(model, batches)
    assert [len(step.sketch) for step in store] == [8, 3]
    torch.testing.assert_close(store[1].sketch, model.gradient)
