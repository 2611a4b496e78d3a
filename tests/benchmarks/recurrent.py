"""What does recording a recurrent layer cost?

    python tests/benchmarks/recurrent.py

A layer and a classifier of its last output are trained by one thread at the recorder's defaults.
Plain and recording runs take turns. The table has a recorded step as a multiple of a plain one: a
ratio of medians of processor time, after the first ten steps.
"""

import argparse
import logging
import tempfile
import warnings
from itertools import pairwise, product
from pathlib import Path
from statistics import median

import pytorch_lightning as pl
import torch
from irregular_rows import QUIET, StepLog
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from tda_lightning import GradientRecorder

WARM_UP, STEPS = 10, 30
WIDTH, CLASSES = 16, 5
LAYERS = {"LSTM": nn.LSTM, "GRU": nn.GRU, "RNN": nn.RNN}
# Number of samples and of time steps, and the width of the state.
SIZES = ((16, 20, 64), (64, 50, 64), (64, 50, 256))


class Recurrent(pl.LightningModule):
    def __init__(self, kind: str, width: int) -> None:
        super().__init__()
        self.layer = LAYERS[kind](WIDTH, width, batch_first=True)
        self.head = nn.Linear(width, CLASSES)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        sequences, labels = batch
        return cross_entropy(self.head(self.layer(sequences)[0][:, -1]), labels)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-2)


def durations(kind: str, size: tuple[int, int, int], is_recorded: bool) -> list[float]:
    torch.manual_seed(0)
    n, steps, width = size
    data = TensorDataset(torch.randn(8 * n, steps, WIDTH), torch.randint(CLASSES, (8 * n,)))
    log = StepLog()
    with tempfile.TemporaryDirectory() as folder:
        recorders = [GradientRecorder(Path(folder) / "run")] if is_recorded else []
        trainer = pl.Trainer(max_epochs=-1, max_steps=STEPS, callbacks=[log, *recorders], **QUIET)
        trainer.fit(Recurrent(kind, width), DataLoader(data, n))
    return [after - before for before, after in pairwise(log.times)][WARM_UP:]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=2, help="pairs of runs per figure")
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    print("| layer | samples | time steps | width | plain step | recording, x plain |")
    print("|---|---|---|---|---|---|")
    for kind, size in product(LAYERS, SIZES):
        plain: list[float] = []
        recorded: list[float] = []
        for _ in range(options.rounds):
            plain += durations(kind, size, is_recorded=False)
            recorded += durations(kind, size, is_recorded=True)
        ratio = median(recorded) / median(plain)
        sizes = " | ".join(map(str, size))
        print(f"| {kind} | {sizes} | {1e3 * median(plain):.1f} ms | {ratio:.2f} |", flush=True)


if __name__ == "__main__":
    main()
