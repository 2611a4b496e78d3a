"""Heads or views that are stacked, `(views, n, d)`, also if they are as many as the samples."""

import pytest
import torch
from lightning_models import Plain, quiet_trainer
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from tda_lightning import GradientRecorder, Identity
from tda_lightning.stores import MemoryStore


class Heads(nn.Module):
    """Several heads on the same features."""

    def __init__(self, count):
        super().__init__()
        self.trunk = nn.Linear(5, 7)
        self.heads = nn.ModuleList(nn.Linear(7, 3) for _ in range(count))

    def forward(self, x):
        features = self.trunk(x).tanh()
        return torch.stack([head(features) for head in self.heads])


class Views(nn.Module):
    """Several views of each sample, one pass for each."""

    def __init__(self, count):
        super().__init__()
        self.count, self.net = count, nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))

    def forward(self, x):
        views = [self.net(x + view) for view in range(self.count)]
        return torch.stack([functional.normalize(view, dim=-1) for view in views])


def squares(outputs, y):
    """Return the loss of each sample."""
    return (outputs - y).square().mean(dim=(0, 2))


def similarities(outputs, y):
    """Return the loss of each sample."""
    return (outputs.logsumexp(dim=-1) - (outputs * y).sum(dim=-1)).mean(dim=0)


@pytest.mark.parametrize("losses", [squares, similarities])
@pytest.mark.parametrize("kind", [Heads, Views])
@pytest.mark.parametrize(("count", "n"), [(3, 3), (2, 2), (4, 2), (2, 4)])
def test_rows_are_the_gradients_of_the_samples(kind, count, n, losses):
    torch.manual_seed(0)
    net = kind(count).double()
    x, y = torch.randn(n, 5).double(), torch.randn(n, 3).double()
    each = losses(net(x), y)
    trained = list(net.parameters())
    rows = [torch.autograd.grad(loss / n, trained, retain_graph=True) for loss in each]
    expected = torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])
    store = MemoryStore()
    model = Plain(net, lambda outputs, y: losses(outputs, y).mean())
    trainer = quiet_trainer(GradientRecorder(store, projector=Identity()), max_epochs=1)
    trainer.fit(model, DataLoader(TensorDataset(x, y), batch_size=n))
    # The products of rows do not depend on the order of the parameters.
    torch.testing.assert_close(store[0].sketch @ store[0].sketch.mT, expected @ expected.mT)
    if losses is squares:
        torch.testing.assert_close(store[0].losses.double(), each.detach())
