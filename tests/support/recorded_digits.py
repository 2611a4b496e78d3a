"""A training on scikit-learn's digits with some wrong labels, recorded in memory."""

import functools
from dataclasses import dataclass

import torch
from lightning_models import Plain, quiet_trainer
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset, TensorDataset

from tda_lightning import GradientRecorder
from tda_lightning.stores import MemoryStore


class DigitsModel(Plain):
    """A small network for digits."""

    def __init__(self) -> None:
        torch.manual_seed(1)
        net = nn.Sequential(nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10))
        super().__init__(net, optimizer=lambda p: torch.optim.AdamW(p, lr=1e-2))

    def forward(self, inputs: Tensor) -> Tensor:
        logits: Tensor = self.net(inputs)
        return logits


@dataclass(frozen=True)
class RecordedDigits:
    """The run, its model and its data.

    Attributes:
        store: The run.
        model: The trained model.
        train: Training samples: a subset, so ids are not positions.
        wrong: Whether each label in ``train`` is wrong.
        test: Test samples.
    """

    store: MemoryStore
    model: DigitsModel
    train: Subset
    wrong: Tensor
    test: TensorDataset

    def loader(self, **settings) -> DataLoader:
        return DataLoader(self.train, batch_size=47, **settings)

    def queries(self, n: int) -> list[Tensor]:
        return [tensor[:n] for tensor in self.test.tensors]


@functools.cache
def recorded_digits() -> RecordedDigits:
    """Train on 301 digits, of which a tenth have the label of the next digit."""
    digits = load_digits()
    images, labels = torch.tensor(digits.data).float() / 16, torch.tensor(digits.target)
    chance = torch.Generator().manual_seed(2)
    chosen = torch.randperm(1000, generator=chance)[:301].sort().values + 100
    wrong = torch.zeros(len(labels), dtype=torch.bool)
    wrong[chosen[torch.randperm(301, generator=chance)[:30]]] = True
    given = torch.where(wrong, (labels + 1) % 10, labels)
    train = Subset(TensorDataset(images, given), chosen.tolist())
    store, model = MemoryStore(), DigitsModel()
    loader = DataLoader(train, batch_size=20, shuffle=True, generator=chance)
    quiet_trainer(GradientRecorder(store), max_epochs=12).fit(model, loader)
    test = TensorDataset(images[1200:1300], labels[1200:1300])
    return RecordedDigits(store, model, train, wrong[chosen], test)
