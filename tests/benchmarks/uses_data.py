"""Prune, select, remove, find watermarks: parts of the benchmark `uses.py`, on digits."""

import copy
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytorch_lightning as pl
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Sampler, TensorDataset

from tda_lightning import (
    GradientRecorder,
    GradientSimilarity,
    HDF5Store,
    InfluenceFunction,
    Logit,
    TracIn,
    Unrolled,
    attribute,
    attribute_by_features,
    record,
    self_influence,
)
from tda_lightning.applications import (
    GraNd,
    LabelLoss,
    coreset,
    prune,
    select,
)
from tda_lightning.attribution import Averaged
from tda_lightning.metrics import mislabel_auc

N_TRAIN, BATCH_SIZE = 1200, 50
METHODS = (Averaged(), Unrolled(), InfluenceFunction(), TracIn(), GradientSimilarity())
Rows = Iterator[tuple[str, float]]
SETTINGS = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


class Classifier(pl.LightningModule):
    """A small network for digits."""

    def __init__(self, optimizer: str = "AdamW", width: int = 64) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 10))
        self.kind = optimizer

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        if self.kind == "SGD":
            return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


class Batches(Sampler[list[int]]):
    """The given batches, in order."""

    def __init__(self, batches: Sequence[list[int]]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)


def digits(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return images and labels of a random training set, and of the test set."""
    bunch = load_digits()
    images, labels = torch.tensor(bunch.data).float() / 16, torch.tensor(bunch.target)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    train, test = order[:N_TRAIN], order[N_TRAIN:]
    return images[train], labels[train], images[test], labels[test]


def batches_of(n: int, epochs: int, seed: int, size: int = BATCH_SIZE) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    orders = [torch.randperm(n, generator=generator) for _ in range(epochs)]
    return [batch.tolist() for order in orders for batch in order.split(size)]


def fit(model: pl.LightningModule, data: TensorDataset, batches: Sequence[list[int]], **recorder):
    """Train with a recorder, and return the run."""
    folder = Path(tempfile.mkdtemp()) / "run.tda"
    trainer = pl.Trainer(max_epochs=1, callbacks=[GradientRecorder(folder, **recorder)], **SETTINGS)
    trainer.fit(model, DataLoader(data, batch_sampler=Batches(batches)))
    return HDF5Store.open(folder)


def retrain(model: Classifier, x: Tensor, y: Tensor, batches: Sequence[list[int]]) -> Classifier:
    """Train without a recorder."""
    optimizer = model.configure_optimizers()
    for batch in batches:
        optimizer.zero_grad()
        cross_entropy(model(x[batch]), y[batch]).backward()
        optimizer.step()
    return model


def accuracy(model: Classifier, x: Tensor, y: Tensor) -> float:
    with torch.no_grad():
        return 100 * float((model(x).argmax(dim=1) == y).float().mean())


def mean_accuracy(
    x: Tensor, y: Tensor, test: tuple[Tensor, Tensor], seed: int, epochs: int, size: int
) -> float:
    """Return the mean accuracy of three new trainings on some data."""
    total = 0.0
    for number in range(3):
        torch.manual_seed(1000 + 10 * seed + number)
        batches = batches_of(len(x), epochs, 1000 + 10 * seed + number, size)
        total += accuracy(retrain(Classifier(), x, y, batches), *test)
    return total / 3


def pruning(seed: int) -> Rows:
    """Prune digits to a half, and train for as many epochs as on all of them."""
    x, y, *test = digits(seed)
    torch.manual_seed(seed)
    run = fit(Classifier(), TensorDataset(x, y), batches_of(N_TRAIN, 20, seed))
    random = torch.randperm(N_TRAIN, generator=torch.Generator().manual_seed(seed))
    choices = {
        "all samples": torch.arange(N_TRAIN),
        "random half": random[: N_TRAIN // 2],
        "half by the loss": prune(run, 0.5, importance=LabelLoss(), balance=y).ids,
        "half by EL2N (default)": prune(run, 0.5, balance=y).ids,
        "half by GraNd": prune(run, 0.5, importance=GraNd(), balance=y).ids,
        "coreset of a half": coreset(run, 0.5, balance=y).ids,
    }
    for name, ids in choices.items():
        yield name, mean_accuracy(x[ids], y[ids], tuple(test), seed, 20, BATCH_SIZE)


def in_domain(images: Tensor, domain: int) -> Tensor:
    """Return images upright, rotated by a quarter, or as negatives."""
    square = images.view(-1, 8, 8)
    return (square, square.rot90(1, (1, 2)), 1 - square)[domain].flatten(1)


def mixed_domains(
    x: Tensor, y: Tensor, generator: torch.Generator
) -> tuple[TensorDataset, Tensor, Tensor]:
    """Return digits in three domains with a fifth of wrong labels, the domains, which are wrong."""
    domains = torch.randint(3, (N_TRAIN,), generator=generator)
    x = torch.stack([in_domain(x[i], int(d))[0] for i, d in enumerate(domains)])
    wrong = torch.rand(N_TRAIN, generator=generator) < 0.2
    others = (y + torch.randint(1, 10, y.shape, generator=generator)) % 10
    return TensorDataset(x, torch.where(wrong, others, y)), domains, wrong


def selecting(seed: int) -> Rows:
    """Select a tenth of mixed and partly mislabelled data for one of three domains."""
    x, y, test_x, test_y = digits(seed)
    generator = torch.Generator().manual_seed(seed)
    data, _, _ = mixed_domains(x, y, generator)
    x, y = data.tensors
    target = (in_domain(test_x[:100], 1), test_y[:100])
    test = (in_domain(test_x[100:], 1), test_y[100:])
    n = N_TRAIN // 10
    torch.manual_seed(seed)
    model = Classifier()
    run = fit(model, data, batches_of(N_TRAIN, 20, seed))
    features = attribute_by_features(model, DataLoader(data, 100), target, progress=False).values
    influence = select(run, model, target, n=n, method=InfluenceFunction(), progress=False)
    averaged = select(run, model, target, n=n, method=Averaged(), progress=False)
    mean = select(run, model, target, n=n, reduce="mean", progress=False)
    choices = {
        "all data": torch.arange(N_TRAIN),
        "random tenth": torch.randperm(N_TRAIN, generator=generator)[:n],
        "feature distance, nearest": features.amax(dim=0).topk(n).indices,
        "feature distance, mean": features.mean(dim=0).topk(n).indices,
        "select (default)": select(run, model, target, n=n, progress=False).ids,
        "select, redundancy .1": select(
            run, model, target, n=n, redundancy=0.1, progress=False
        ).ids,
        "select by the mean": mean.ids,
        "select by InfluenceFunction": influence.ids,
        "select by Averaged": averaged.ids,
    }
    for name, ids in choices.items():
        yield name, mean_accuracy(x[ids], y[ids], test, seed, 100, 30)
    # A pool that the model was not trained on: the second half.
    half = N_TRAIN // 2
    torch.manual_seed(seed)
    model = Classifier()
    run = fit(model, TensorDataset(x[:half], y[:half]), batches_of(half, 20, seed))
    loader = DataLoader(TensorDataset(x[half:], y[half:]), 100)
    pool = record(model, loader, like=run, progress=False)
    features = attribute_by_features(model, loader, target, progress=False).values
    choices = {
        "pool: random fifth": torch.randperm(half, generator=generator)[:n],
        "pool: feature distance, nearest": features.amax(dim=0).topk(n).indices,
        "pool: select (default)": select(run, model, target, n=n, pool=pool, progress=False).ids,
    }
    for name, ids in choices.items():
        yield name, mean_accuracy(x[half:][ids], y[half:][ids], test, seed, 100, 30)


def removing(seed: int) -> Rows:
    """Remove the top 5 % proponents of a prediction, and train again from the same weights."""
    x, y, test_x, test_y = digits(seed)
    batches = batches_of(N_TRAIN, 10, seed)
    torch.manual_seed(seed)
    initial = Classifier()
    model = copy.deepcopy(initial)
    run = fit(model, TensorDataset(x, y), batches, curvature="fisher")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        right = (model(test_x).argmax(dim=1) == test_y).nonzero()[:, 0]
    chosen = right[torch.randperm(len(right), generator=generator)[:20]]
    queries = (test_x[chosen], test_y[chosen])
    features = attribute_by_features(
        model, DataLoader(TensorDataset(x, y), 100), queries, progress=False
    ).values
    same_class = y == queries[1][:, None]
    scores = {
        "random": torch.rand(len(chosen), N_TRAIN, generator=generator),
        "random of the class": torch.rand(len(chosen), N_TRAIN, generator=generator) + same_class,
        "feature distance within the class": features + 2 * same_class,
        **{
            repr(method).split("(")[0]: attribute(
                run, model, queries, method=method, progress=False
            ).values
            for method in METHODS
        },
    }
    for name, values in scores.items():
        flips = 0
        for row, ids in enumerate(values.topk(N_TRAIN // 20, dim=1).indices):
            removed = set(ids.tolist())
            rest = [[i for i in batch if i not in removed] for batch in batches]
            again = retrain(copy.deepcopy(initial), x, y, rest)
            with torch.no_grad():
                flips += int(again(queries[0][row : row + 1]).argmax()) != int(queries[1][row])
        yield name, 100 * flips / len(chosen)


def watermark(seed: int) -> Rows:
    """Find the training samples with a mark that makes the model predict a 3."""
    x, y, test_x, test_y = digits(seed)
    generator = torch.Generator().manual_seed(seed)
    marked = torch.zeros(N_TRAIN, dtype=torch.bool)
    marked[torch.randperm(N_TRAIN, generator=generator)[:36]] = True

    def stamp(images: Tensor) -> Tensor:
        square = images.clone().view(-1, 8, 8)
        square[:, :2, :2] = 1.0
        return square.flatten(1)

    x, y = torch.where(marked[:, None], stamp(x), x), torch.where(marked, 3, y)
    torch.manual_seed(seed)
    model = Classifier()
    run = fit(model, TensorDataset(x, y), batches_of(N_TRAIN, 10, seed))
    others = test_y != 3
    queries = (stamp(test_x[others][:60]), test_y[others][:60])
    features = attribute_by_features(
        model, DataLoader(TensorDataset(x, y), 100), queries, progress=False
    )
    loss = LabelLoss().scores(run).values
    yield "loss", mislabel_auc(loss, marked)
    yield "feature distance", mislabel_auc(features.values.mean(dim=0), marked)
    yield "self-influence", mislabel_auc(self_influence(run, progress=False).values, marked)
    for method in (Unrolled(), InfluenceFunction(), TracIn()):
        scores = attribute(run, model, queries, method=method, target=Logit(3), progress=False)
        yield repr(method).split("(")[0], mislabel_auc(scores.values.mean(dim=0), marked)


USES: dict[str, tuple[str, Callable[[int], Rows]]] = {
    "prune": ("digits pruned to 50 %, test accuracy in %", pruning),
    "select": ("10 % for a domain, test accuracy in %", selecting),
    "remove": ("flips in % after removing 5 %", removing),
    "watermark": ("AUC of marked samples", watermark),
}
