"""A training by two processes; run as a script, since each process runs it from its beginning."""

import json
import logging
import os
import sys
import time
import warnings
from functools import partial
from pathlib import Path

import pytorch_lightning as pl
import torch
from lightning_models import Plain, Telling, mlp, quiet_trainer
from manual_models import Gan
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.plugins.io import TorchCheckpointIO
from torch.utils.data import DataLoader, DistributedSampler, SequentialSampler

from tda_lightning import GradientRecorder, HDF5Store, Identity
from tda_lightning.stores import MemoryStore

OPTIMIZERS = {
    "SGD": partial(torch.optim.SGD, lr=0.1),
    "AdamW": partial(torch.optim.AdamW, lr=0.01),
}


class SlowStore(HDF5Store):
    """Takes its time to seal in all processes but the first, and notes who keeps weights."""

    rank = os.environ.get("LOCAL_RANK", "0")

    def seal(self):
        time.sleep(0.3 * int(self.rank))
        super().seal()

    def keep_weights(self, index, weights):
        with (self.path.parent / "writers").open("a") as file:
            file.write(f"{self.rank}:{index} ")
        super().keep_weights(index, weights)


class Looks(TorchCheckpointIO):
    """Keeps how many steps a checkpoint has taken, and how many can be read as it is written."""

    def __init__(self, run):
        self.run, self.seen = run, []

    def save_checkpoint(self, checkpoint, path, storage_options=None):
        self.seen.append((checkpoint["global_step"], len(HDF5Store.open(self.run))))
        super().save_checkpoint(checkpoint, path, storage_options)


STORES = {
    "HDF5Store": partial(HDF5Store, storage="as computed"),
    "SlowStore": partial(SlowStore, storage="as computed"),
    "MemoryStore": lambda _: MemoryStore(),
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
        recorder = GradientRecorder(
            STORES[given.get("store", "HDF5Store")](folder / "run"),
            projector=Identity(),
            audit=1,
            curvature=given.get("curvature", "none"),
            max_overhead=given.get("max_overhead"),
            snapshots=given.get("snapshots", 0),
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
    looks = Looks(folder / "run")
    pl.seed_everything(3, verbose=False)
    model = Gan() if given.get("gan") else Plain(mlp(), optimizer=OPTIMIZERS[given["optimizer"]])
    trainer = quiet_trainer(
        *callbacks,
        devices=devices,
        strategy=given.get("strategy", "ddp") if devices > 1 else "auto",
        enable_checkpointing="checkpoint" in given,
        plugins=[looks] if "checkpoint" in given else [],
        **given.get("trainer", {}),
    )
    resume = given.get("resume")
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        trainer.fit(model, DataLoader(data, batch_size=batch, sampler=sampler), ckpt_path=resume)
    if trainer.is_global_zero:
        weights = [one.tolist() for one in model.parameters()]
        read = len(recorder.store) if given.get("record", True) else 0
        said = [str(one.message) for one in told]
        result = {"weights": weights, "read": read, "seen": looks.seen, "warnings": said}
        (folder / "result.json").write_text(json.dumps(result))


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    torch.set_num_threads(1)
    train(Path(sys.argv[1]), int(sys.argv[2]), json.loads(sys.argv[3]))
    # Threads of gloo that are still there when Python ends bring the process down, now and then.
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
