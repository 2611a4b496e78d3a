"""Train a case for two epochs, interrupted after the first, and ask the run."""

from pathlib import Path

import pytorch_lightning as pl
import torch
from lightning_models import quiet_trainer
from torch.utils.data import DataLoader
from zoo_cases import Case, quiet

from tda_lightning import GradientRecorder, HDF5Store, Scores, attribute, self_influence
from tda_lightning.results import SampleScores

N_TRAIN, N_QUERY, BATCH_SIZE, STEPS = 12, 3, 5, 6


def train_and_resume(
    case: Case, folder: Path, sampled: float = 0.0
) -> tuple[HDF5Store, pl.LightningModule]:
    """Train at the defaults for an epoch, then continue from the checkpoint in a new process's way.

    Args:
        case: What to train.
        folder: Folder for the run and the checkpoint.
        sampled: Share of the steps with sampled labels, after the first.
    """
    settings = {"curvature": "fisher", "curvature_share": sampled} if sampled else {}
    checkpoint = None
    for epochs in (1, 2):
        model = case.module()
        torch.manual_seed(epochs)
        trainer = quiet_trainer(GradientRecorder(folder / "run", **settings), max_epochs=epochs)
        loader = DataLoader(case.dataset(N_TRAIN), batch_size=BATCH_SIZE, shuffle=True)
        with quiet():
            trainer.fit(model, loader, ckpt_path=checkpoint)
        checkpoint = folder / "last.ckpt"
        trainer.save_checkpoint(checkpoint)
    return HDF5Store.open(folder / "run"), model


def ask(store: HDF5Store, model: pl.LightningModule, case: Case) -> tuple[Scores, SampleScores]:
    """Return the scores for some queries, and each training sample's effect on itself."""
    with quiet():
        scores = attribute(store, model, case.batch(N_QUERY), progress=False)
        return scores, self_influence(store, progress=False)
