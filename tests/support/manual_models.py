"""Modules with manual optimization that log the expected rows of each step."""

import pytorch_lightning as pl
import torch
from torch import nn
from torch.nn.functional import cross_entropy, softplus


class Manual(pl.LightningModule):
    """Log the gradient of each sample's part of the loss before each backward pass.

    Attributes:
        expected_steps: Per optimizer step, the part of the model, the sample ids, and the rows.
    """

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.net = nn.Sequential(nn.Linear(7, 5), nn.ReLU(), nn.Linear(5, 3))
        self.logged, self.lr = [], {"net": 0.1}

    def logged_backward(self, losses, *parts, scale=1.0, **settings):
        for part in parts:
            parameters = list(getattr(self, part).parameters())
            rows = [
                torch.cat(
                    [
                        torch.zeros(p.numel()) if g is None else g.flatten()
                        for p, g in zip(
                            parameters,
                            torch.autograd.grad(
                                scale * loss / len(losses),
                                parameters,
                                retain_graph=True,
                                allow_unused=True,
                            ),
                            strict=True,
                        )
                    ]
                )
                for loss in losses
            ]
            self.logged.append((part, self.ids, torch.stack(rows)))
        self.manual_backward(scale * losses.mean(), **settings)

    def take_step(self, optimizer, part, factor=1.0):
        """Take a step; its expected rows are those logged for the part since its last step."""
        used = [entry for entry in self.logged if entry[0] == part]
        self.logged = [entry for entry in self.logged if entry[0] != part]
        ids = torch.cat([ids for _, ids, _ in used])
        self.expected_steps.append((part, ids, factor * torch.cat([rows for *_, rows in used])))
        optimizer.step()

    def training_step(self, batch, batch_idx):
        self.ids = batch[0][:, 0].long()
        self.train_on(batch, batch_idx)

    def train_on(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.logged_backward(cross_entropy(self.net(batch[0]), batch[1], reduction="none"), "net")
        self.take_step(optimizer, "net")

    def configure_optimizers(self):
        return torch.optim.SGD(self.net.parameters(), lr=0.1)

    def on_train_start(self):
        self.expected_steps = []


class Gan(Manual):
    """The order of Lightning's GAN example: each optimizer zeroes its gradients before its pass."""

    def __init__(self):
        super().__init__()
        del self.net
        self.generator = nn.Sequential(nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 7))
        self.discriminator = nn.Sequential(nn.Linear(7, 5), nn.ReLU(), nn.Linear(5, 1))

    def train_on(self, batch, batch_idx):
        generator_optimizer, discriminator_optimizer = self.optimizers()
        self.train_generator(batch, generator_optimizer)
        self.train_discriminator(batch, discriminator_optimizer)

    def train_generator(self, batch, generator_optimizer):
        generated = self.generator(batch[0])
        generator_optimizer.zero_grad()
        self.logged_backward(softplus(-self.discriminator(generated)[:, 0]), "generator")
        self.take_step(generator_optimizer, "generator")

    def train_discriminator(self, batch, discriminator_optimizer):
        discriminator_optimizer.zero_grad()
        real = self.discriminator(batch[0])
        generated = self.discriminator(self.generator(batch[0]).detach())
        self.logged_backward(softplus(-real)[:, 0] + softplus(generated)[:, 0], "discriminator")
        self.take_step(discriminator_optimizer, "discriminator")

    def configure_optimizers(self):
        return [
            torch.optim.SGD(self.generator.parameters(), lr=0.1),
            torch.optim.SGD(self.discriminator.parameters(), lr=0.2),
        ]
