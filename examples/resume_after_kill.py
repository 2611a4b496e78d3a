"""Resume after a kill: the run on disk holds every step once.

The training runs in a second process, which is killed in its middle (`kill -9`). Training then
goes on from the last checkpoint, and so does the recording.
"""

import os
import signal
import sys
from pathlib import Path

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.multiprocessing import get_context
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from tda_lightning import GradientRecorder, HDF5Store
from tda_lightning.cli import main as tda_lightning
from tda_lightning.stores import data_order

RUN, CHECKPOINTS, EPOCHS = Path("resumed.tda"), Path("resumed_checkpoints"), 6


class Digits(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


class PowerCut(pl.Callback):
    """Kill the process after a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: pl.Trainer, *_: object) -> None:
        if trainer.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def train(recorder: GradientRecorder, *callbacks: pl.Callback, checkpoint: str | None) -> None:
    pl.seed_everything(0, verbose=False)
    images, labels = map(torch.tensor, load_digits(return_X_y=True))
    data = TensorDataset(images[:1500].float() / 16, labels[:1500])
    saving = ModelCheckpoint(CHECKPOINTS, save_last=True, enable_version_counter=False)
    trainer = pl.Trainer(
        max_epochs=EPOCHS,
        accelerator="cpu",
        callbacks=[recorder, saving, *callbacks],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    loader = DataLoader(data, batch_size=50, shuffle=True)
    trainer.fit(Digits(), loader, ckpt_path=checkpoint)


def train_and_die() -> None:
    train(GradientRecorder(RUN, existing="replace"), PowerCut(step=100), checkpoint=None)


def main() -> None:
    process = get_context("spawn").Process(target=train_and_die)
    process.start()
    process.join()
    print(f"\nThe process was killed by signal {-(process.exitcode or 0)} after step 100.")
    print(f"On disk are {len(HDF5Store.open(RUN))} whole steps. Resuming from the checkpoint.\n")

    train(GradientRecorder(RUN), checkpoint=str(CHECKPOINTS / "last.ckpt"))
    indices = [step.index for step in HDF5Store.open(RUN).facts]
    assert indices == list(range(30 * EPOCHS)), "every step once"
    assert not data_order(RUN).replayed
    tda_lightning(["data", str(RUN)])
    sys.exit(tda_lightning(["verify", str(RUN)]))


if __name__ == "__main__":
    main()
