"""DDP trainings with settings from the command line, one after another.

Each process runs this script, and so imports torch once for all of them.
"""

import json
import logging
import os
import sys
import time
import warnings
from functools import partial
from pathlib import Path

import lean_lightning  # noqa: F401, before Lightning
import pytorch_lightning as pl
import torch
from lightning_models import IndexedVectors, Plain, mlp, quiet_trainer
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
    """A store that seals slowly except in process 0, and logs which process keeps weights."""

    rank = os.environ.get("LOCAL_RANK", "0")

    def seal(self):
        time.sleep(0.3 * int(self.rank))
        super().seal()

    def keep_weights(self, index, weights):
        with (self.path.parent / "writers").open("a") as file:
            file.write(f"{self.rank}:{index} ")
        super().keep_weights(index, weights)


class CheckpointLog(TorchCheckpointIO):
    """Log the steps of each saved checkpoint, and how many recorded steps are readable then."""

    def __init__(self, run):
        self.run, self.saved = run, []

    def save_checkpoint(self, checkpoint, path, storage_options=None):
        self.saved.append((checkpoint["global_step"], len(HDF5Store.open(self.run))))
        super().save_checkpoint(checkpoint, path, storage_options)


class FailingStore(HDF5Store):
    """A store whose file system fails in process 1 before step 5."""

    def append(self, step):
        if step.index == 5 and os.environ.get("LOCAL_RANK") == "1":
            raise ConnectionRefusedError("refused")
        super().append(step)


class FaultyIds:
    """Returns one id too many in one process, from some batch on."""

    def __init__(self, rank, batch):
        self.rank, self.batch, self.calls = str(rank), batch, 0

    def __call__(self, batch):
        self.calls += 1
        is_faulty = self.calls > self.batch and os.environ.get("LOCAL_RANK") == self.rank
        return torch.arange(len(batch[0]) + is_faulty)


STORES = {
    "HDF5Store": partial(HDF5Store, storage="as computed"),
    "SlowStore": partial(SlowStore, storage="as computed"),
    "FailingStore": FailingStore,
    "MemoryStore": lambda _: MemoryStore(),
}


class ExitAt(pl.Callback):
    """End one process after a step."""

    def __init__(self, rank, at):
        self.rank, self.at = rank, at

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == self.at and trainer.global_rank == self.rank:
            os._exit(1)


class ResetAt(pl.Callback):
    """Reset the state of all optimizers after some steps."""

    def __init__(self, steps):
        self.steps = steps

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step in self.steps:
            for optimizer in trainer.optimizers:
                optimizer.state.clear()


def train(folder, devices, settings):
    """Train on global batches of four, split among the processes."""
    folder.mkdir(exist_ok=True)
    n, batch = 12 - settings.get("ragged", 0), 4 // devices
    data = IndexedVectors(n)
    if devices == 1:
        sampler = SequentialSampler(data)
    else:
        rank = int(os.environ.get("LOCAL_RANK", 0))
        sampler = DistributedSampler(data, devices, rank, shuffle=False)
    callbacks = []
    if settings.get("record", True):
        recorder = GradientRecorder(
            STORES[settings.get("store", "HDF5Store")](folder / "run"),
            projector=Identity(),
            audit=settings.get("audit", 1),
            curvature=settings.get("curvature", "none"),
            max_overhead=settings.get("max_overhead"),
            snapshots=settings.get("snapshots", 0),
            existing=settings.get("existing", "refuse"),
            sample_ids=FaultyIds(*settings["faulty"]) if "faulty" in settings else None,
        )
        callbacks.append(recorder)
    if "checkpoint" in settings:
        callbacks.append(
            ModelCheckpoint(
                folder, every_n_train_steps=settings["checkpoint"], save_top_k=-1, filename="{step}"
            )
        )
    if "resets" in settings:
        callbacks.append(ResetAt(settings["resets"]))
    if "dies" in settings:
        callbacks.append(ExitAt(1, settings["dies"]))
    checkpoints = CheckpointLog(folder / "run")
    pl.seed_everything(3, verbose=False)
    optimizer = OPTIMIZERS[settings.get("optimizer", "SGD")]
    model = Gan() if settings.get("gan") else Plain(mlp(), optimizer=optimizer)
    trainer = quiet_trainer(
        *callbacks,
        devices=devices,
        strategy=settings.get("strategy", "ddp") if devices > 1 else "auto",
        enable_checkpointing="checkpoint" in settings,
        plugins=[checkpoints] if "checkpoint" in settings else [],
        **settings.get("trainer", {}),
    )
    resume = settings.get("resume")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(model, DataLoader(data, batch_size=batch, sampler=sampler), ckpt_path=resume)
    texts = [str(warning.message) for warning in caught]
    (folder / f"warnings-{trainer.global_rank}.json").write_text(json.dumps(texts))
    if trainer.is_global_zero:
        weights = [parameter.tolist() for parameter in model.parameters()]
        read = len(recorder.store) if settings.get("record", True) else 0
        result = {
            "weights": weights,
            "read": read,
            "seen": checkpoints.saved,
            "warnings": texts,
        }
        (folder / "result.json").write_text(json.dumps(result))


def train_or_refuse(folder, settings):
    """Train by two processes; each writes the error that it raises, if one is expected."""
    if not settings.pop("refused", False):
        train(folder, 2, settings)
        return
    try:
        train(folder, 2, settings)
    except (ValueError, FileExistsError) as error:
        (folder / f"error-{os.environ['LOCAL_RANK']}").write_text(str(error))


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    torch.set_num_threads(1)
    for name, settings in json.loads(sys.argv[2]):
        train_or_refuse(Path(sys.argv[1]) / name, settings)
    # Threads of gloo that are alive when Python exits sometimes crash the process.
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
