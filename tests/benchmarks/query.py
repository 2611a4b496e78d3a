"""What does a query cost? Time of a pass over a store, relative to the bare matrix products.

    python tests/benchmarks/query.py
    python tests/benchmarks/query.py --queries 200 --epochs 20 --rounds 9

A digits MLP is trained and recorded to disk; its test digits are the queries. Each method is timed
on that HDF5 store, on the same steps in a `MemoryStore`, and on the bare products: the same arrays
in memory, step by step, without sums, damping or look-ups. `TracIn` needs one product per step.
`Unrolled`, whose curvature here consists of the scored rows, needs three: scores, directions from
the scores, and the rows' Gram matrix. The strict minimum for an adjoint of gradient descent is two.

All take turns, and each round gives one ratio. The table has their median, with the smallest and
the largest in brackets. Files have been read before, so they come from the page cache. The last
lines are the seconds of more methods from the store, the median of as many rounds.
"""

import argparse
import logging
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median

import pytorch_lightning as pl
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from tda_lightning import GradientRecorder, HDF5Store, InfluenceFunction, TracIn, Unrolled
from tda_lightning.attribution import Attributor, Averaged
from tda_lightning.passes.queries import record_queries
from tda_lightning.stores import MemoryStore, Step

NOTHING_ELSE = {"logger": False, "enable_checkpointing": False}
NOTHING_ELSE |= {"enable_progress_bar": False, "enable_model_summary": False}


class Classifier(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def recorded(folder: Path, epochs: int, n_query: int) -> tuple[HDF5Store, Tensor]:
    """Record a training on disk, and return it with the rows of its queries."""
    pl.seed_everything(0, verbose=False)
    digits = load_digits()
    images, labels = torch.tensor(digits.data).float() / 16, torch.tensor(digits.target)
    train = TensorDataset(images[n_query:], labels[n_query:])
    model = Classifier()
    recorder = GradientRecorder(str(folder))
    trainer = pl.Trainer(max_epochs=epochs, accelerator="cpu", callbacks=[recorder], **NOTHING_ELSE)
    trainer.fit(model, DataLoader(train, batch_size=50, shuffle=True))
    run = HDF5Store.open(folder)
    return run, record_queries(
        model, (images[:n_query], labels[:n_query]), like=run, progress=False
    )


def in_memory(run: HDF5Store) -> MemoryStore:
    """Return the same run in memory."""
    store = MemoryStore()
    store.begin(run.recipe)
    for step in run:
        store.append(step)
    return store


def one_product(steps: Sequence[Step], queries: Tensor) -> None:
    """Compute the minimum that TracIn needs."""
    for step in steps:
        step.sketch @ queries.mT


def three_products(steps: Sequence[Step], queries: Tensor) -> None:
    """Compute the products of Unrolled's formula."""
    for step in reversed(steps):
        rows = step.sketch
        (queries @ rows.mT) @ rows
        rows @ rows.mT


def two_products(steps: Sequence[Step], queries: Tensor) -> None:
    """Compute the minimum that an adjoint of gradient descent needs."""
    for step in reversed(steps):
        (queries @ step.sketch.mT) @ step.sketch


Bare = Callable[[Sequence[Step], Tensor], None]
CASES: list[tuple[Attributor, Bare]] = [
    (TracIn(), one_product),
    (Unrolled(), three_products),
    (Unrolled(), two_products),
]


def seconds(task: Callable[[], object]) -> float:
    start = time.perf_counter()
    task()
    return time.perf_counter() - start


def ratios(
    method: Attributor, bare: Bare, run: HDF5Store, queries: Tensor, rounds: int
) -> list[list[float]]:
    """Return the bare time and the ratios of both stores to it, for every round but the first."""
    memory = in_memory(run)
    steps = list(memory)
    tasks = (
        lambda: bare(steps, queries),
        lambda: method.attribute(memory, queries, progress=False),
        lambda: method.attribute(run, queries, progress=False),
    )
    times = [[seconds(task) for task in tasks] for _ in range(rounds + 1)][1:]
    columns = [[plain, cached / plain, disk / plain] for plain, cached, disk in times]
    return [list(column) for column in zip(*columns, strict=True)]


def spread(values: Sequence[float]) -> str:
    return f"{median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--queries", type=int, default=200)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()

    warnings.simplefilter("ignore")
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        run, queries = recorded(Path(folder) / "run.tda", options.epochs, options.queries)
        n_query, k = queries.shape
        visits = sum(len(step.sample_ids) for step in run)
        print(f"{len(run)} steps, {visits:,} visits, {n_query} queries, rows of {k} numbers")
        print(f"{'method':26s} {'bare':>8s}  {'in memory, x bare':24s} HDF5 store, x bare")
        for method, products in CASES:
            bare, memory, disk = ratios(method, products, run, queries, options.rounds)
            name = f"{type(method).__name__}, {products.__name__}"
            print(f"{name:26s} {1e3 * median(bare):5.0f} ms  {spread(memory):24s} {spread(disk)}")
        for other in (TracIn(), Unrolled(), InfluenceFunction(), Averaged()):
            ask = partial(other.attribute, run, queries, progress=False)
            times = [seconds(ask) for _ in range(options.rounds)]
            print(f"{type(other).__name__:26s} {median(times):5.2f} s")


if __name__ == "__main__":
    main()
