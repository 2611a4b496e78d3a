"""A training by two processes; run as a script, since each process runs it from its beginning."""

import json
import logging
import os
import sys
import warnings
from functools import partial
from pathlib import Path

import pytorch_lightning as pl
import torch
from lightning_models import Plain, mlp, quiet_trainer
from pytorch_lightning.callbacks import ModelCheckpoint
from test_manual import Gan
from test_sample_ids import Telling
from torch.utils.data import DataLoader, DistributedSampler, SequentialSampler

from tda_lightning import GradientRecorder, HDF5Store, Identity, MemoryStore

OPTIMIZERS = {
    "SGD": partial(torch.optim.SGD, lr=0.1),
    "AdamW": partial(torch.optim.AdamW, lr=0.01),
}


class Dies(pl.Callback):
    def __init__(self, rank, at):
        self.rank, self.at = rank, at

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == self.at and trainer.global_rank == self.rank:
            os._exit(1)


def train(folder, devices, given):
    """Train on global batches of four, whoever has which part of them."""
    n, batch = 12 - given.get("ragged", 0), 4 // devices
    data = Telling(n)
    if devices == 1:
        sampler = SequentialSampler(data)
    else:
        rank = int(os.environ.get("LOCAL_RANK", 0))
        sampler = DistributedSampler(data, devices, rank, shuffle=False)
    callbacks = []
    if given.get("record", True):
        store = (
            MemoryStore()
            if given.get("memory")
            else HDF5Store(folder / "run", storage="as computed")
        )
        recorder = GradientRecorder(
            store,
            projector=Identity(),
            audit=1,
            curvature=given.get("curvature", "none"),
            max_overhead=given.get("max_overhead"),
            existing=given.get("existing", "refuse"),
        )
        callbacks.append(recorder)
    if "checkpoint" in given:
        callbacks.append(
            ModelCheckpoint(
                folder, every_n_train_steps=given["checkpoint"], save_top_k=-1, filename="{step}"
            )
        )
    if "dies" in given:
        callbacks.append(Dies(1, given["dies"]))
    pl.seed_everything(3, verbose=False)
    model = Gan() if given.get("gan") else Plain(mlp(), optimizer=OPTIMIZERS[given["optimizer"]])
    trainer = quiet_trainer(
        *callbacks,
        devices=devices,
        strategy=given.get("strategy", "ddp") if devices > 1 else "auto",
        enable_checkpointing="checkpoint" in given,
        **given.get("trainer", {}),
    )
    resume = given.get("resume")
    trainer.fit(model, DataLoader(data, batch_size=batch, sampler=sampler), ckpt_path=resume)
    if trainer.is_global_zero:
        weights = [one.tolist() for one in model.parameters()]
        read = len(recorder.store) if given.get("record", True) else 0
        (folder / "result.json").write_text(json.dumps({"weights": weights, "read": read}))


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    torch.set_num_threads(1)
    train(Path(sys.argv[1]), int(sys.argv[2]), json.loads(sys.argv[3]))
