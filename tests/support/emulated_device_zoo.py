"""Record models of the zoo on both devices; run as a script.

Its arguments are `cuda` or `apple`, and names of models.

Without names, it records all of them. 15 of 88 need what the emulated device lacks: compiled
functions, indices that are lists, fused recurrent cells, sums of bags, products of groups, random
numbers of its own.
"""

import os
import sys
import tempfile
import warnings
from pathlib import Path

import emulated_device
import pytorch_lightning as pl
import torch
from emulated_trainings import HERE, KINDS, THERE, Place, outcome, same_values
from torch import Tensor
from torch.utils.data import DataLoader
from zoo_cases import Case, quiet
from zoo_models import ZOO

from tda_lightning import GradientRecorder
from tda_lightning.stores import MemoryStore

N = 5


def rows(case: Case, place: Place) -> Tensor:
    """Return the rows of one step."""
    model: pl.LightningModule = case.module(torch.float32)
    model.train(case.mode == "train")
    store = MemoryStore()
    torch.manual_seed(0)
    with quiet():
        trainer = place.trainer(GradientRecorder(store, preconditioner="none"), max_epochs=1)
        trainer.fit(model, DataLoader(case.dataset(N, torch.float32), batch_size=N))
    return store[0].sketch


def compare(name: str) -> str:
    """Return the outcome for a model of the zoo."""
    return outcome(lambda: same_values(rows(ZOO[name], THERE), rows(ZOO[name], HERE)))


def in_a_fork(name: str, folder: Path) -> str:
    """Return the outcome; an error in a backward pass on the device ends the process."""
    file = folder / "outcome.txt"
    file.write_text("its process died")
    child = os.fork()
    if child == 0:
        file.write_text(compare(name))
        os._exit(0)
    os.waitpid(child, 0)
    return file.read_text()


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    libraries = emulated_device.install(KINDS[sys.argv[1]])
    with tempfile.TemporaryDirectory() as workspace:
        for name in sys.argv[2:] or ZOO:
            print(name, in_a_fork(name, Path(workspace)), sep=": ", flush=True)
