"""What does a long run cost? Memory, open files and time per step while recording.

    python tests/benchmarks/load.py
    python tests/benchmarks/load.py --plain

A small model is trained for 100,000 steps. The table has, after each tenth of the training, the
memory of the process, its open files and threads, the segments on disk, and the processor time per
1000 steps. ``--plain`` trains without recording.
"""

import argparse
import logging
import tempfile
import threading
import time
import warnings
from pathlib import Path

import pytorch_lightning as pl
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from tda_lightning import GradientRecorder, HDF5Store


def seconds_to_read(path: Path) -> float:
    start = time.perf_counter()
    for step in HDF5Store.open(path):
        assert len(step.sketch)
    return time.perf_counter() - start


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
        self.since = time.process_time()

    def on_train_batch_end(self, trainer, *_):
        step = trainer.global_step
        if step % self.every:
            return
        seconds = (time.process_time() - self.since) / self.every * 1000
        status = Path("/proc/self/status").read_text().split("VmRSS:")[1].split()[0]
        files = len(list(Path("/proc/self/fd").iterdir()))
        segments = len(list(self.run.glob("segment-*")))
        print(
            f"  {step:>9,}  {int(status) / 1024:7.1f} MB  {files:3} files  "
            f"{threading.active_count()} threads  {segments:4} segments  {seconds:.2f} s",
            flush=True,
        )
        self.since = time.process_time()


def print_load(folder: Path, steps: int, is_recorded: bool) -> None:
    print(f"{'Recording' if is_recorded else 'Training'} {steps:,} steps:")
    generator = torch.Generator().manual_seed(7)
    data = TensorDataset(
        torch.randn(4096, 8, generator=generator), torch.randint(3, (4096,), generator=generator)
    )
    recorders = [GradientRecorder(folder / "long")] if is_recorded else []
    trainer = pl.Trainer(
        callbacks=[*recorders, Watch(steps, folder / "long")],
        **{"max_steps": steps, "max_epochs": -1, "accelerator": "cpu", "logger": False},
        **dict.fromkeys(
            ("enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False
        ),
    )
    trainer.fit(Small(), DataLoader(data, batch_size=16, shuffle=True))
    if not is_recorded:
        return
    start = time.perf_counter()
    run = HDF5Store.open(folder / "long")
    opened = time.perf_counter() - start
    print(f"  {len(run):,} steps opened in {opened:.2f} s, ", end="")
    print(f"read in {seconds_to_read(folder / 'long'):.2f} s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=100_000)
    parser.add_argument("--plain", action="store_true")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        print_load(Path(folder), options.steps, not options.plain)


if __name__ == "__main__":
    main()
