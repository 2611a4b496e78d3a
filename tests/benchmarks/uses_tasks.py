"""Real data sets with flipped labels, and the trainings of the benchmark `uses.py`."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial

import pytorch_lightning as pl
import torch
from sklearn.datasets import load_breast_cancer, load_digits, load_sample_images, load_wine
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d, cross_entropy
from torch.utils.data import DataLoader, Dataset, TensorDataset

from tda_lightning import GradientRecorder
from tda_lightning.stores import MemoryStore

FLIPPED = 0.1
QUIET = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


@dataclass(frozen=True)
class Task:
    """A data set and how to train on it.

    Attributes:
        name: Name in the tables.
        data: Returns inputs and labels.
        n_train: Number of training samples; all others are test samples.
        network: Creates the untrained network.
        lr: Learning rate of AdamW.
        epochs: Passes over the data.
        batch_size: Samples per step.
    """

    name: str
    data: Callable[[], tuple[Tensor, Tensor]]
    n_train: int
    network: Callable[[], nn.Module]
    lr: float
    epochs: int
    batch_size: int


@dataclass(frozen=True)
class Noisy:
    """One split of a task, with flipped training labels.

    Attributes:
        inputs: Inputs of the training samples.
        given: Labels of the training samples, some of them wrong.
        true: Their true labels.
        test: Test samples with true labels.
    """

    inputs: Tensor
    given: Tensor
    true: Tensor
    test: TensorDataset

    @property
    def wrong(self) -> Tensor:
        """Whether each training label is wrong."""
        return self.given != self.true


def split(task: Task, seed: int, flipped: float = FLIPPED) -> Noisy:
    """Split the data at random, and flip a share of the training labels to another class."""
    inputs, labels = task.data()
    chance = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(labels), generator=chance)
    train, test = order[: task.n_train], order[task.n_train :]
    classes = int(labels.max()) + 1
    shifts = torch.randint(1, classes, (len(train),), generator=chance)
    is_flipped = torch.randperm(len(train), generator=chance) < round(flipped * len(train))
    given = torch.where(is_flipped, (labels[train] + shifts) % classes, labels[train])
    return Noisy(inputs[train], given, labels[train], TensorDataset(inputs[test], labels[test]))


@dataclass(frozen=True)
class Planted:
    """Training data with copies and foreign samples, all in random order.

    Attributes:
        inputs: Inputs.
        labels: Labels.
        same: Copies with the same label, and their originals.
        other: Copies with another label, and their originals.
        foreign: Samples of other data, with random labels.
    """

    inputs: Tensor
    labels: Tensor
    same: Tensor
    other: Tensor
    foreign: Tensor


def plant(data: Noisy, seed: int) -> Planted:
    """Add copies with noise of 2 % of a standard deviation, and foreign samples, 2 % each.

    Foreign images are patches of the photographs that come with scikit-learn. Foreign rows of a
    table take each feature from another row.
    """
    chance = torch.Generator().manual_seed(1000 + seed)
    x, y = data.inputs, data.given
    n, count, classes = len(y), max(4, len(y) // 50), int(y.max()) + 1
    originals = torch.randperm(n, generator=chance)[: 2 * count]
    noise = 0.02 * x.std() * torch.randn(x[originals].shape, generator=chance)
    shifts = torch.randint(1, classes, (count,), generator=chance)
    labels = torch.cat([y[originals[:count]], (y[originals[count:]] + shifts) % classes])
    foreign = patches(count, chance) if x[0].numel() == 64 else mixtures(x, count, chance)
    random_labels = torch.randint(classes, (count,), generator=chance)
    inputs = torch.cat([x, x[originals] + noise, foreign.reshape(-1, *x.shape[1:])])
    same, other, is_foreign = torch.zeros(3, n + 3 * count, dtype=torch.bool)
    same[originals[:count]] = same[n : n + count] = True
    other[originals[count:]] = other[n + count : n + 2 * count] = True
    is_foreign[n + 2 * count :] = True
    order = torch.randperm(len(inputs), generator=chance)
    all_labels = torch.cat([y, labels, random_labels])
    return Planted(inputs[order], all_labels[order], same[order], other[order], is_foreign[order])


def patches(n: int, chance: torch.Generator) -> Tensor:
    images = [
        torch.tensor(image).float().mean(dim=2) / 255 for image in load_sample_images().images
    ]
    crops = []
    for _ in range(n):
        image = images[int(torch.randint(len(images), (1,), generator=chance))]
        top, left = (int(torch.randint(side - 64, (1,), generator=chance)) for side in image.shape)
        crop = adaptive_avg_pool2d(image[None, top : top + 64, left : left + 64], 8)[0]
        crops.append((crop - crop.min()) / (crop.max() - crop.min()).clamp_min(1e-6))
    return torch.stack(crops)


def mixtures(x: Tensor, n: int, chance: torch.Generator) -> Tensor:
    rows = torch.randint(len(x), (n, x.shape[1]), generator=chance)
    return x[rows, torch.arange(x.shape[1])]


class Classifier(pl.LightningModule):
    """A network with a cross-entropy, as a user would write it."""

    def __init__(self, task: Task) -> None:
        super().__init__()
        self.net, self.lr = task.network(), task.lr

    def forward(self, inputs: Tensor) -> Tensor:
        logits: Tensor = self.net(inputs)
        return logits

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=self.lr)


def train(task: Task, data: Dataset[object], seed: int, *callbacks: pl.Callback) -> Classifier:
    """Train with Lightning."""
    torch.manual_seed(seed)
    model = Classifier(task)
    order = torch.Generator().manual_seed(seed)
    loader = DataLoader(data, task.batch_size, shuffle=True, generator=order)
    trainer = pl.Trainer(max_epochs=task.epochs, callbacks=list(callbacks), **QUIET)
    trainer.fit(model, loader)
    return model.eval()


def train_quickly(task: Task, inputs: Tensor, labels: Tensor, seed: int) -> Classifier:
    """Train alike in a bare loop, in a third of the time."""
    torch.manual_seed(seed)
    model = Classifier(task)
    optimizer = model.configure_optimizers()
    for _ in range(task.epochs):
        for batch in torch.randperm(len(labels)).split(task.batch_size):
            optimizer.zero_grad()
            cross_entropy(model(inputs[batch]), labels[batch]).backward()
            optimizer.step()
    return model.eval()


def recorded(task: Task, data: TensorDataset, seed: int) -> tuple[MemoryStore, Classifier]:
    store = MemoryStore()
    return store, train(task, data, seed, GradientRecorder(store))


@torch.no_grad()
def accuracy(model: Classifier, data: TensorDataset) -> float:
    """Return the share of correct predictions."""
    inputs, labels = data.tensors
    return float((model(inputs).argmax(dim=1) == labels).float().mean())


@cache
def digits(*shape: int) -> tuple[Tensor, Tensor]:
    dataset = load_digits()
    return torch.tensor(dataset.data).float().reshape(-1, *shape) / 16, torch.tensor(dataset.target)


@cache
def table(load: Callable[[], object]) -> tuple[Tensor, Tensor]:
    dataset = load()
    raw = torch.tensor(dataset.data)
    return ((raw - raw.mean(dim=0)) / raw.std(dim=0)).float(), torch.tensor(dataset.target)


def perceptron(n_inputs: int, hidden: int, classes: int) -> nn.Module:
    return nn.Sequential(nn.Linear(n_inputs, hidden), nn.ReLU(), nn.Linear(hidden, classes))


def convolutional() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1, stride=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32 * 16, 10),
    )


ALL = (
    Task("digits MLP", partial(digits, 64), 1400, partial(perceptron, 64, 64, 10), 3e-3, 15, 50),
    Task("digits CNN", partial(digits, 1, 8, 8), 1400, convolutional, 3e-3, 10, 50),
    Task(
        "breast cancer",
        partial(table, load_breast_cancer),
        400,
        partial(perceptron, 30, 32, 2),
        3e-3,
        20,
        20,
    ),
    Task("wine", partial(table, load_wine), 120, partial(perceptron, 13, 16, 3), 1e-2, 20, 10),
)
TASKS = {task.name: task for task in ALL}
