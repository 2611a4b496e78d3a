"""Modules that optimize manually."""

import pytorch_lightning as pl
import torch
from torch import nn
from torch.nn.functional import cross_entropy, softplus


class Manual(pl.LightningModule):
    """Writes down, before each backward pass, the gradient of every sample's part of the loss."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.net = nn.Sequential(nn.Linear(7, 5), nn.ReLU(), nn.Linear(5, 3))
        self.told, self.lr = [], {"net": 0.1}

    def backward_from(self, losses, *parts, scale=1.0, **settings):
        for part in parts:
            parameters = list(getattr(self, part).parameters())
            rows = [
                torch.cat(
                    [
                        torch.zeros(p.numel()) if g is None else g.flatten()
                        for p, g in zip(
                            parameters,
                            torch.autograd.grad(
                                scale * one / len(losses),
                                parameters,
                                retain_graph=True,
                                allow_unused=True,
                            ),
                            strict=True,
                        )
                    ]
                )
                for one in losses
            ]
            self.told.append((part, self.ids, torch.stack(rows)))
        self.manual_backward(scale * losses.mean(), **settings)

    def take_step(self, optimizer, part, factor=1.0):
        """Say which of what was told the step uses."""
        used = [one for one in self.told if one[0] == part]
        self.told = [one for one in self.told if one[0] != part]
        ids = torch.cat([ids for _, ids, _ in used])
        self.truth.append((part, ids, factor * torch.cat([rows for *_, rows in used])))
        optimizer.step()

    def training_step(self, batch, batch_idx):
        self.ids = batch[0][:, 0].long()
        self.one_batch(batch, batch_idx)

    def one_batch(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.backward_from(cross_entropy(self.net(batch[0]), batch[1], reduction="none"), "net")
        self.take_step(optimizer, "net")

    def configure_optimizers(self):
        return torch.optim.SGD(self.net.parameters(), lr=0.1)

    def on_train_start(self):
        self.truth = []


class Gan(Manual):
    """The order of Lightning's own example: each zeroes its gradients before its pass."""

    def __init__(self):
        super().__init__()
        del self.net
        self.maker = nn.Sequential(nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 7))
        self.judge = nn.Sequential(nn.Linear(7, 5), nn.ReLU(), nn.Linear(5, 1))

    def one_batch(self, batch, batch_idx):
        makes, judges = self.optimizers()
        self.make(batch, makes)
        self.decide(batch, judges)

    def make(self, batch, makes):
        made = self.maker(batch[0])
        makes.zero_grad()
        self.backward_from(softplus(-self.judge(made)[:, 0]), "maker")
        self.take_step(makes, "maker")

    def decide(self, batch, judges):
        judges.zero_grad()
        real, made = self.judge(batch[0]), self.judge(self.maker(batch[0]).detach())
        self.backward_from(softplus(-real)[:, 0] + softplus(made)[:, 0], "judge")
        self.take_step(judges, "judge")

    def configure_optimizers(self):
        return [
            torch.optim.SGD(self.maker.parameters(), lr=0.1),
            torch.optim.SGD(self.judge.parameters(), lr=0.2),
        ]
