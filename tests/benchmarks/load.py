"""What does a long run cost? Checksums while reading; memory and time per step while recording.

    python tests/benchmarks/load.py
    python tests/benchmarks/load.py --steps 100000

First, the time to read every step of a run, with checksums and without: the second run is a copy
whose segments have no header, as those of version 0.1.0, and which is therefore not verified. Both
take turns, and each round opens the run afresh; files come from the page cache. The table has the
median over the rounds.

With ``--steps``, a small model is trained that long. The second table has, after each tenth of the
training, the memory of the process, its open files and threads, and the time per 1000 steps.
"""

import argparse
import logging
import shutil
import tempfile
import threading
import time
import warnings
from pathlib import Path
from statistics import median

import pytorch_lightning as pl
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from tda_lightning import GradientRecorder, HDF5Store
from tda_lightning.stores.hdf5.segment_header import HEADER_BYTES
from tda_lightning.stores.recipe import Block, Recipe
from tda_lightning.stores.step import ParameterGroup, Step

SHAPES = {"batch 16, 128 wide": (16, 128), "batch 128, 2048 wide": (128, 2048)}


def write_run(path: Path, n: int, dimension: int, megabytes: int) -> None:
    """Write a run of random rows."""
    block = Block("net", "Linear", ("net",), ("net.weight",), 1, dimension)
    projector = {"name": "Identity"}
    store = HDF5Store(path)
    store.begin(Recipe((block,), (), projector, dimension, train_ids=((0, 4096),)))
    generator = torch.Generator().manual_seed(0)
    for index in range(megabytes * 2**20 // (2 * n * dimension)):
        store.append(
            Step(
                index=index,
                epoch=0,
                optimizer="SGD",
                groups=(ParameterGroup(lr=0.1),),
                sample_ids=torch.randint(4096, (n,), generator=generator),
                weights=torch.full((n,), 1 / n),
                sketch=torch.randn(n, dimension, generator=generator),
            )
        )
    store.seal()


def without_headers(path: Path, copy: Path) -> Path:
    """Copy a run, as an earlier version would have written it."""
    shutil.copytree(path, copy)
    for file in copy.glob("segment-*.h5"):
        file.write_bytes(file.read_bytes()[HEADER_BYTES:])
    for file in copy.glob("manifest*"):
        file.unlink()
    return copy


def seconds_to_read(path: Path) -> float:
    start = time.perf_counter()
    for step in HDF5Store.open(path):
        assert len(step.sketch)
    return time.perf_counter() - start


def print_cost_of_checksums(folder: Path, megabytes: int, rounds: int) -> None:
    print(f"Reading all steps of a run of {megabytes} MB:")
    for name, (n, dimension) in SHAPES.items():
        path = folder / name
        write_run(path, n, dimension, megabytes)
        plain = without_headers(path, folder / f"{name}, plain")
        pairs = [(seconds_to_read(path), seconds_to_read(plain)) for _ in range(rounds)]
        verified, unverified = (median(times) for times in zip(*pairs, strict=True))
        cost = median(a / b - 1 for a, b in pairs)
        print(f"  {name:21} {unverified:.3f} s; with checksums {verified:.3f} s, {cost:+.1%}")


class Small(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.LayerNorm(12), nn.Linear(12, 3))

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


class Watch(pl.Callback):
    """Print the state of the process after each tenth of the training."""

    def __init__(self, steps: int, run: Path) -> None:
        self.every, self.run, self.since = max(1, steps // 10), run, 0.0

    def on_train_start(self, *_):
        self.since = time.perf_counter()

    def on_train_batch_end(self, trainer, *_):
        step = trainer.global_step
        if step % self.every:
            return
        seconds = (time.perf_counter() - self.since) / self.every * 1000
        status = Path("/proc/self/status").read_text().split("VmRSS:")[1].split()[0]
        files = len(list(Path("/proc/self/fd").iterdir()))
        segments = len(list(self.run.glob("segment-*")))
        print(
            f"  {step:>9,}  {int(status) / 1024:7.1f} MB  {files:3} files  "
            f"{threading.active_count()} threads  {segments:4} segments  {seconds:.2f} s"
        )
        self.since = time.perf_counter()


def print_load(folder: Path, steps: int) -> None:
    print(f"Recording {steps:,} steps:")
    generator = torch.Generator().manual_seed(7)
    data = TensorDataset(
        torch.randn(4096, 8, generator=generator), torch.randint(3, (4096,), generator=generator)
    )
    trainer = pl.Trainer(
        callbacks=[GradientRecorder(folder / "long"), Watch(steps, folder / "long")],
        **{"max_steps": steps, "max_epochs": -1, "accelerator": "cpu", "logger": False},
        **dict.fromkeys(
            ("enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False
        ),
    )
    trainer.fit(Small(), DataLoader(data, batch_size=16, shuffle=True))
    start = time.perf_counter()
    run = HDF5Store.open(folder / "long")
    opened = time.perf_counter() - start
    print(f"  {len(run):,} steps opened in {opened:.2f} s, ", end="")
    print(f"read in {seconds_to_read(folder / 'long'):.2f} s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megabytes", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=0)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        print_cost_of_checksums(Path(folder), options.megabytes, options.rounds)
        if options.steps:
            print_load(Path(folder), options.steps)


if __name__ == "__main__":
    main()
