"""The tasks of the benchmark `lds.py`: models, data and training settings.

If a task has labels, a tenth of the training labels is wrong; those of the queries are right. All
data come with scikit-learn and Python. (Python's help differs a little between versions, and so
does the text.)
"""

import hashlib
import math
import pydoc_data.topics
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache, partial

import pytorch_lightning as pl
import torch
from lds_networks import Network, convolutional, normalized, perceptron, transformer
from sklearn.datasets import load_breast_cancer, load_diabetes, load_digits
from torch import Tensor
from torch.nn.functional import cross_entropy, mse_loss, one_hot, pad
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, TensorDataset

FLIPPED = 0.1
CONTEXT = 4
COMMON_CHARACTERS = 40


@dataclass(frozen=True)
class Data:
    """The training samples and the queries of a task.

    Attributes:
        train: Inputs and targets of the training samples.
        queries: Inputs and targets of the queries.
    """

    train: TensorDataset
    queries: TensorDataset

    def digest(self) -> str:
        """Return a fingerprint of every tensor."""
        digest = hashlib.sha256()
        for tensor in (*self.train.tensors, *self.queries.tensors):
            digest.update(tensor.contiguous().numpy().tobytes())
        return digest.hexdigest()


@dataclass(frozen=True)
class Task:
    """The full definition of a training.

    Attributes:
        name: Name on the command line.
        title: Name in the table.
        data: Creates the data, always the same.
        network: Creates an untrained network from torch's random numbers.
        optimizer: Creates the optimizer of some parameters.
        is_cosine: Whether the learning rate falls to zero along half a cosine, step by step.
        batch_size: Samples per step.
        epochs: Passes over the data.
        raw_points: Maps inputs to points of a space that needs no training, one per prediction.
    """

    name: str
    title: str
    data: Callable[[], Data]
    network: Callable[[], Network]
    optimizer: Callable[[Iterable[Tensor]], Optimizer]
    is_cosine: bool
    batch_size: int
    epochs: int
    raw_points: Callable[[Tensor], Tensor]

    def schedule(self, optimizer: Optimizer, steps: int) -> LambdaLR:
        """Return the learning rate schedule of a training with that number of steps."""
        half_turn = math.pi / steps if self.is_cosine else 0.0
        return LambdaLR(optimizer, lambda step: (1 + math.cos(half_turn * step)) / 2)

    @property
    def has_classes(self) -> bool:
        """Whether targets are classes, not numbers."""
        return not self.data().train.tensors[1].is_floating_point()

    @property
    def steps(self) -> int:
        """Number of steps of a training."""
        return self.epochs * math.ceil(len(self.data().train) / self.batch_size)

    def settings(self) -> str:
        """Describe everything that a training depends on, except its random numbers."""
        optimizer = self.optimizer([torch.zeros(1)])
        parts = (self.data().digest(), self.network(), optimizer, self.is_cosine)
        return repr((*parts, self.batch_size, self.epochs))


def sample_losses(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return each sample's loss, the mean over its predictions: squared error or cross-entropy."""
    if targets.is_floating_point():
        return mse_loss(outputs, targets, reduction="none").mean(dim=1)
    losses = cross_entropy(outputs.flatten(0, -2), targets.flatten(), reduction="none")
    return losses.unflatten(0, (len(targets), -1)).mean(dim=1)


class Learner(pl.LightningModule):
    """The training of a task, as a user would write it."""

    def __init__(self, task: Task) -> None:
        super().__init__()
        self.task, self.network = task, task.network()

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        inputs, targets = batch
        outputs = self.network(inputs)
        if targets.is_floating_point():
            return mse_loss(outputs, targets)
        return cross_entropy(outputs.flatten(0, -2), targets.flatten())

    def configure_optimizers(self) -> dict[str, object]:
        optimizer = self.task.optimizer(self.parameters())
        scheduler = self.task.schedule(optimizer, int(self.trainer.estimated_stepping_batches))
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }


def train(task: Task, seed: int, *callbacks: pl.Callback) -> Learner:
    """Train with Lightning."""
    torch.manual_seed(seed)
    learner = Learner(task)
    order = torch.Generator().manual_seed(seed)
    loader = DataLoader(task.data().train, task.batch_size, shuffle=True, generator=order)
    trainer = pl.Trainer(
        max_epochs=task.epochs,
        callbacks=list(callbacks),
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(learner, loader)
    return learner


def labelled(inputs: Tensor, labels: Tensor, n_train: int, n_query: int) -> Data:
    """Split at random, and flip a tenth of the training labels to another class."""
    chance = torch.Generator().manual_seed(0)
    order = torch.randperm(len(labels), generator=chance)
    train, queries = order[:n_train], order[n_train : n_train + n_query]
    classes = int(labels.max()) + 1
    shifts = torch.randint(1, classes, (n_train,), generator=chance)
    flipped = torch.rand(n_train, generator=chance) < FLIPPED
    noisy = torch.where(flipped, (labels[train] + shifts) % classes, labels[train])
    return Data(
        TensorDataset(inputs[train], noisy), TensorDataset(inputs[queries], labels[queries])
    )


@cache
def digits(*shape: int) -> Data:
    dataset = load_digits()
    images = torch.tensor(dataset.data).float().reshape(-1, *shape) / 16
    return labelled(images, torch.tensor(dataset.target), n_train=1000, n_query=100)


@cache
def breast_cancer() -> Data:
    dataset = load_breast_cancer()
    raw = torch.tensor(dataset.data)
    standardized = (raw - raw.mean(dim=0)) / raw.std(dim=0)
    return labelled(standardized.float(), torch.tensor(dataset.target), n_train=400, n_query=100)


@cache
def diabetes() -> Data:
    """Return standardized measurements and progressions of a disease, in random order."""
    dataset = load_diabetes(scaled=False)
    raw = torch.tensor(dataset.data), torch.tensor(dataset.target)[:, None]
    inputs, targets = (((v - v.mean(dim=0)) / v.std(dim=0)).float() for v in raw)
    order = torch.randperm(len(targets), generator=torch.Generator().manual_seed(0))
    train, queries = order[:340], order[340:440]
    return Data(
        TensorDataset(inputs[train], targets[train]),
        TensorDataset(inputs[queries], targets[queries]),
    )


@cache
def images_as_targets() -> Data:
    """Return digits whose targets are the images themselves."""
    data = digits(64)
    train, queries = (
        TensorDataset(part.tensors[0], part.tensors[0]) for part in (data.train, data.queries)
    )
    return Data(train, queries)


@cache
def characters(length: int, n_train: int, n_query: int) -> Data:
    """Return excerpts of Python's help, where each character's target is the next one."""
    text = " ".join(" ".join(pydoc_data.topics.topics.values()).lower().split())
    text = text[: (length + 1) * (n_train + n_query)]
    by_count = sorted(set(text), key=lambda letter: (-text.count(letter), letter))
    number = {letter: rank + 1 for rank, letter in enumerate(by_count[: COMMON_CHARACTERS - 1])}
    tokens = torch.tensor([number.get(letter, 0) for letter in text])
    tokens = tokens.unflatten(0, (-1, length + 1))
    tokens = tokens[torch.randperm(len(tokens), generator=torch.Generator().manual_seed(0))]
    pairs = TensorDataset(tokens[:, :-1], tokens[:, 1:])
    return Data(TensorDataset(*pairs[:n_train]), TensorDataset(*pairs[n_train:]))


def one_point(inputs: Tensor) -> Tensor:
    return inputs.flatten(1)[:, None].float()


def last_characters(tokens: Tensor) -> Tensor:
    """Return, per place, the last few characters as one-hot vectors; fewer at the beginning."""
    seen = one_hot(tokens, COMMON_CHARACTERS).float()
    length = tokens.shape[1]
    shifted = [pad(seen, (0, 0, ago, 0))[:, :length] for ago in range(CONTEXT)]
    return torch.cat(shifted, dim=-1)


ALL = (
    Task(
        "digits-mlp",
        "digits MLP, SGD",
        partial(digits, 64),
        partial(perceptron, 64, (64, 64), 10),
        partial(SGD, lr=0.1),
        is_cosine=False,
        batch_size=50,
        epochs=20,
        raw_points=one_point,
    ),
    Task(
        "digits-cnn",
        "digits CNN, AdamW, cosine",
        partial(digits, 1, 8, 8),
        convolutional,
        partial(AdamW, lr=3e-3),
        is_cosine=True,
        batch_size=50,
        epochs=30,
        raw_points=one_point,
    ),
    Task(
        "characters",
        "character transformer, AdamW",
        partial(characters, length=32, n_train=600, n_query=100),
        partial(transformer, COMMON_CHARACTERS, length=32, width=32, heads=2, depth=2),
        partial(AdamW, lr=1e-3),
        is_cosine=False,
        batch_size=25,
        epochs=10,
        raw_points=last_characters,
    ),
    Task(
        "breast-cancer",
        "breast cancer MLP, momentum",
        breast_cancer,
        partial(perceptron, 30, (32,), 2),
        partial(SGD, lr=0.03, momentum=0.9),
        is_cosine=False,
        batch_size=40,
        epochs=20,
        raw_points=one_point,
    ),
    Task(
        "diabetes",
        "diabetes MLP, regression, Adam",
        diabetes,
        partial(perceptron, 10, (32,), 1),
        partial(Adam, lr=3e-3),
        is_cosine=False,
        batch_size=20,
        epochs=20,
        raw_points=one_point,
    ),
    Task(
        "autoencoder",
        "digits autoencoder, 64 outputs, Adam",
        images_as_targets,
        partial(perceptron, 64, (24,), 64),
        partial(Adam, lr=3e-3),
        is_cosine=False,
        batch_size=50,
        epochs=10,
        raw_points=one_point,
    ),
    Task(
        "batch-norm-adamw",
        "digits CNN with batch norm, AdamW",
        partial(digits, 1, 8, 8),
        normalized,
        partial(AdamW, lr=3e-3),
        is_cosine=False,
        batch_size=50,
        epochs=10,
        raw_points=one_point,
    ),
    Task(
        "batch-norm-sgd",
        "digits CNN with batch norm, SGD",
        partial(digits, 1, 8, 8),
        normalized,
        partial(SGD, lr=0.05),
        is_cosine=False,
        batch_size=50,
        epochs=10,
        raw_points=one_point,
    ),
)
TASKS = {task.name: task for task in ALL}
