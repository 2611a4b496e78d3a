"""Two views of each sample, one below the other, have the rows of their sample in any loss."""

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
