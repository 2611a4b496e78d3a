"""What does recording cost per layer where arithmetic costs nothing?

    python tests/benchmarks/many_layers.py
    python tests/benchmarks/many_layers.py --optimizers AdamW --settings rows --rounds 9

A network of 146 small layers is trained by one thread. Its time is launches and Python, as on a
GPU: a proxy for one. Plain and recording runs take turns in a real Trainer, with the store on disk.
The columns:

- a recorded step as a multiple of a plain one, after the first 24 steps and within the first 20, in
  which coordinates of an adaptive optimizer are young, and in which all steps sample labels. Each
  is a ratio of medians over all blocks of four steps: one of the four samples a quarter's labels;
- the time that recording adds per layer, and the plain step's time per layer beside it;
- the operations that recording adds per layer: top-level calls that reach the dispatcher.

A layer is a module with parameters; each meets its data in one node of the autograd graph.
"""

import argparse
import logging
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from statistics import mean, median
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, gelu, scaled_dot_product_attention
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, TensorDataset

from tda_lightning import GradientRecorder

YOUNG, WARM_UP, STEPS = 20, 24, 49
# A quarter of the steps: one in each block of four, counted from the 20th step.
BLOCK = 4
SETTINGS: dict[str, dict[str, Any]] = {
    "rows": {},
    "a quarter of sampled labels": {"curvature": "fisher", "curvature_share": 0.25},
    "all sampled labels": {"curvature": "fisher"},
}
OPTIMIZERS = {"SGD": {"lr": 0.01}, "AdamW": {"lr": 1e-4}}
HEADINGS = ("optimizer", "recorded", "x plain", "x plain, young", "us a layer", "plain us a layer")
HEADINGS += ("operations a layer", "plain operations a layer")
QUIET = {"logger": False, "enable_checkpointing": False, "accelerator": "cpu"}
QUIET |= {"enable_progress_bar": False, "enable_model_summary": False}


class Block(nn.Module):
    """A transformer block with six layers."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.before_attention, self.before_feed_forward = nn.LayerNorm(width), nn.LayerNorm(width)
        self.queries_keys_values, self.output = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.widen, self.narrow = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        three = self.queries_keys_values(self.before_attention(x)).chunk(3, dim=-1)
        x = x + self.output(scaled_dot_product_attention(*three))
        return x + self.narrow(gelu(self.widen(self.before_feed_forward(x))))


class Training(pl.LightningModule):
    def __init__(self, optimizer: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        blocks = (Block(32) for _ in range(24))
        self.net = nn.Sequential(nn.Linear(16, 32), *blocks, nn.Linear(32, 10))
        self.optimizer = optimizer

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        inputs, labels = batch
        return cross_entropy(self.net(inputs).mean(dim=1), labels)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        kind = getattr(torch.optim, self.optimizer)
        return kind(self.parameters(), **OPTIMIZERS[self.optimizer])


class OperationCounter(TorchDispatchMode):
    """Counts the operations that reach the dispatcher."""

    total = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None):
        OperationCounter.total += 1
        return function(*args, **(kwargs or {}))


class StepLog(pl.Callback):
    """Keeps the time, and the number of operations so far, at the start of each step."""

    clock: Callable[[], float] = time.perf_counter

    def __init__(self) -> None:
        self.times: list[float] = []
        self.operations: list[int] = []

    def on_train_batch_start(self, *arguments: object) -> None:
        self.times.append(StepLog.clock())
        self.operations.append(OperationCounter.total)


@dataclass
class Steps:
    """Mean durations of a step in blocks of four, in seconds, over several runs."""

    young: list[float] = field(default_factory=list)
    later: list[float] = field(default_factory=list)

    def add(self, log: StepLog) -> None:
        durations = [after - before for before, after in pairwise(log.times)]
        self.young += blocks(durations[BLOCK:YOUNG])  # The first also checks and builds tables.
        self.later += blocks(durations[WARM_UP:])


def blocks(values: list[float]) -> list[float]:
    """Return the means of successive blocks."""
    return [mean(values[start : start + BLOCK]) for start in range(0, len(values), BLOCK)]


def train(optimizer: str, settings: dict[str, Any] | None) -> StepLog:
    """Train, with the recorder unless ``settings`` is ``None``."""
    log = StepLog()
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(64, 8, 16, generator=generator)
    labels = torch.randint(10, (64,), generator=generator)
    loader = DataLoader(TensorDataset(inputs, labels), batch_size=8)
    with tempfile.TemporaryDirectory() as folder:
        is_plain = settings is None
        recorders = [] if is_plain else [GradientRecorder(Path(folder) / "run", **settings)]
        trainer = pl.Trainer(max_epochs=-1, max_steps=STEPS, callbacks=[log, *recorders], **QUIET)
        trainer.fit(Training(optimizer), loader)
    return log


def operations(optimizer: str, settings: dict[str, Any] | None) -> float:
    """Return the median over blocks of the mean number of operations of a step."""
    with OperationCounter():
        log = train(optimizer, settings)
    return median(blocks([b - a for a, b in pairwise(log.operations[WARM_UP:])]))


def measure(optimizer: str, name: str, rounds: int) -> list[str]:
    """Return one line of the table."""
    settings = SETTINGS[name]
    plain, recording = Steps(), Steps()
    for _ in range(rounds):
        plain.add(train(optimizer, None))
        recording.add(train(optimizer, settings))
    before, after = median(plain.later), median(recording.later)
    layers = sum(bool(module._parameters) for module in Training(optimizer).modules())
    plain_operations = operations(optimizer, None)
    return [
        optimizer,
        name,
        f"{after / before:.2f}",
        f"{median(recording.young) / median(plain.young):.2f}",
        f"{1e6 * (after - before) / layers:.0f}",
        f"{1e6 * before / layers:.0f}",
        f"{(operations(optimizer, settings) - plain_operations) / layers:.1f}",
        f"{plain_operations / layers:.1f}",
    ]


def print_row(cells: list[str]) -> None:
    print(f"| {' | '.join(cells)} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--optimizers", nargs="+", choices=OPTIMIZERS, default=list(OPTIMIZERS))
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS)[:2])
    parser.add_argument("--rounds", type=int, default=5, help="pairs of runs per line")
    parser.add_argument("--cpu-time", action="store_true", help="of the process; for busy machines")
    options = parser.parse_args()
    if options.cpu_time:
        StepLog.clock = time.process_time
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    print_row(list(HEADINGS))
    print_row(["---"] * len(HEADINGS))
    for optimizer in options.optimizers:
        for name in options.settings:
            print_row(measure(optimizer, name, options.rounds))


if __name__ == "__main__":
    main()
