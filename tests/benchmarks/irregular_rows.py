"""What do rows in no regular order cost? Graphs and packed sequences beside rows in order.

    python tests/benchmarks/irregular_rows.py

Three models are trained by one thread at the recorder's defaults, on samples of equal sizes and of
different ones. With equal sizes, the shapes show whose row each one is. With different ones, the
batches of graphs state it. Each recorded batch of packed sequences takes two more backward passes,
which compute no parameter's gradient. Plain and recording runs take turns. The table has a recorded
step as a multiple of a plain one: a ratio of medians of processor time, after the first ten steps.
"""

import argparse
import logging
import tempfile
import time
import warnings
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

from tda_lightning import GradientRecorder

WARM_UP, STEPS = 10, 40
SAMPLES, BATCH, WIDTH = 256, 32, 64
QUIET = {"logger": False, "enable_checkpointing": False, "accelerator": "cpu"}
QUIET |= {"enable_progress_bar": False, "enable_model_summary": False}
Sample = tuple[Tensor, int]


def samples(are_equal: bool) -> list[Sample]:
    """Return sets of 20 vectors, or of 10 to 30."""
    random = torch.Generator().manual_seed(0)
    sizes = torch.randint(10, 31, (SAMPLES,), generator=random).tolist()
    sets = [torch.randn(20 if are_equal else size, WIDTH, generator=random) for size in sizes]
    return [(vectors, number % 10) for number, vectors in enumerate(sets)]


def joined(batch: list[Sample]) -> tuple[Tensor, Tensor, Tensor]:
    """Join sets; the second tensor holds the sample of each vector."""
    sets, labels = zip(*batch, strict=True)
    lengths = torch.tensor([len(vectors) for vectors in sets])
    owners = torch.repeat_interleave(torch.arange(len(sets)), lengths)
    return torch.cat(sets), owners, torch.tensor(labels)


class Training(pl.LightningModule):
    def training_step(self, batch: tuple[Tensor, Tensor, Tensor], batch_idx: int) -> Tensor:
        vectors, owners, labels = batch
        return cross_entropy(self.logits(vectors, owners, len(labels)), labels)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


class Graphs(Training):
    """Five layers of message passing along a ring, and a sum over the nodes."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(self.layer() for _ in range(5))
        self.head = nn.Linear(WIDTH, 10)

    def layer(self) -> nn.Module:
        return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH), nn.ReLU())

    def logits(self, hidden: Tensor, owners: Tensor, n: int) -> Tensor:
        last = owners.diff(append=owners.new_tensor([n])) != 0
        starts = torch.searchsorted(owners, owners)
        targets = torch.where(last, starts, torch.arange(len(owners)) + 1)
        for layer in self.layers:
            hidden = layer(hidden.index_add(0, targets, hidden))
        return self.head(hidden.new_zeros(n, WIDTH).index_add(0, owners, hidden))


class NormedGraphs(Graphs):
    """The same, with a batch norm in each layer."""

    def layer(self) -> nn.Module:
        return nn.Sequential(nn.Linear(WIDTH, WIDTH, bias=False), nn.BatchNorm1d(WIDTH), nn.ReLU())


class Packed(Training):
    """A recurrent network over packed sequences."""

    def __init__(self) -> None:
        super().__init__()
        self.recurrent, self.head = nn.LSTM(WIDTH, WIDTH), nn.Linear(WIDTH, 10)

    def logits(self, vectors: Tensor, owners: Tensor, n: int) -> Tensor:
        sequences = vectors.split(owners.bincount(minlength=n).tolist())
        packed = nn.utils.rnn.pack_sequence(sequences, enforce_sorted=False)
        return self.head(self.recurrent(packed)[1][0][-1])


MODELS = {"graphs": Graphs, "graphs, batch norm": NormedGraphs, "packed sequences": Packed}


class StepLog(pl.Callback):
    def __init__(self) -> None:
        self.times: list[float] = []

    def on_train_batch_start(self, *arguments: object) -> None:
        self.times.append(time.process_time())


def durations(model: type[Training], are_equal: bool, is_recorded: bool) -> list[float]:
    torch.manual_seed(0)
    log = StepLog()
    loader = DataLoader(samples(are_equal), BATCH, collate_fn=joined, drop_last=True)
    with tempfile.TemporaryDirectory() as folder:
        recorders = [GradientRecorder(Path(folder) / "run")] if is_recorded else []
        trainer = pl.Trainer(max_epochs=-1, max_steps=STEPS, callbacks=[log, *recorders], **QUIET)
        trainer.fit(model(), loader)
    return [after - before for before, after in pairwise(log.times)][WARM_UP:]


def ratio(model: type[Training], are_equal: bool, rounds: int) -> float:
    plain: list[float] = []
    recorded: list[float] = []
    for _ in range(rounds):
        plain += durations(model, are_equal, is_recorded=False)
        recorded += durations(model, are_equal, is_recorded=True)
    return median(recorded) / median(plain)


def print_row(*cells: Any) -> None:
    print(f"| {' | '.join(cells)} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3, help="pairs of runs per figure")
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    print_row("model", "equal sizes, x plain", "different sizes, x plain")
    print_row("---", "---", "---")
    for name, model in MODELS.items():
        figures = (ratio(model, are_equal, options.rounds) for are_equal in (True, False))
        print_row(name, *(f"{figure:.2f}" for figure in figures))


if __name__ == "__main__":
    main()
