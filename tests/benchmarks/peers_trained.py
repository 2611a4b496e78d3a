"""What the users of other libraries have after a training: weights, checkpoints and the data."""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytorch_lightning as pl
import torch
from lds_networks import Network
from lds_retraining import Weights
from lds_runs import Run
from lds_tasks import Learner, Task, train
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from tda_lightning import GradientRecorder, HDF5Store


class Checkpoints(pl.Callback):
    """Save weights and learning rate after each epoch, for the methods that read checkpoints."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.paths = folder, []

    def on_train_epoch_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Save the checkpoint of this epoch."""
        path = self.folder / f"epoch-{trainer.current_epoch:03d}.pt"
        rate = trainer.optimizers[0].param_groups[0]["lr"]
        torch.save({"weights": module.network.state_dict(), "rate": rate}, path)
        self.paths.append(str(path))


@dataclass(frozen=True)
class Trained:
    """One training, as each library finds it.

    Attributes:
        runs: The same training with a recorder at its defaults, and more of them for ensembles.
        paths: Checkpoints, one per epoch, of weights and learning rates.
        folder: Where libraries may write.
        times: Seconds of the training alone, with checkpoints, and with the recorder.
    """

    runs: list[Run]
    paths: list[str]
    folder: Path
    times: tuple[float, float, float]

    @property
    def run(self) -> Run:
        """The recorded training."""
        return self.runs[0]

    @property
    def task(self) -> Task:
        """The task that was trained."""
        return self.run.task

    @property
    def train(self) -> TensorDataset:
        """The training samples."""
        return self.task.data().train

    @property
    def final(self) -> Weights:
        """The state dict at the end of the training."""
        return self.run.learner.network.state_dict()

    @property
    def ensemble(self) -> list[Weights]:
        """The state dicts at the end of all trainings."""
        return [run.learner.network.state_dict() for run in self.runs]

    @property
    def rates(self) -> list[float]:
        """The learning rates that the checkpoints hold."""
        return [torch.load(path)["rate"] for path in self.paths]

    def network(self) -> Network:
        """Return a new network with the final weights."""
        network = self.task.network().eval()
        network.load_state_dict(self.final)
        return network

    def checkpoints(self) -> list[Weights]:
        """Return the weights after each epoch."""
        return [torch.load(path)["weights"] for path in self.paths]

    def batches(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield the indices, inputs and targets of each step of the training."""
        for indices in self.run.batches:
            yield (indices, *self.train[indices])


def train_models(task: Task, folder: Path, seed: int, models: int) -> Trained:
    """Train several models with a recorder; the first also alone and with checkpoints."""
    folder.mkdir(parents=True)
    _, alone = timed(task, seed)
    checkpoints = Checkpoints(folder)
    plain, with_checkpoints = timed(task, seed, checkpoints)
    runs = [recorded(task, folder / f"{number}.tda", seed + number) for number in range(models)]
    for name, value in plain.network.state_dict().items():
        assert torch.equal(value, runs[0].final[name]), name
    runs[0].require_replayable()
    return Trained(runs, checkpoints.paths, folder, (alone, with_checkpoints, runs[0].seconds))


def recorded(task: Task, store: Path, seed: int) -> Run:
    """Train with a recorder at its defaults."""
    learner, seconds = timed(task, seed, GradientRecorder(store, existing="replace"))
    return Run(task, learner, HDF5Store.open(store), seconds, seed)


def timed(task: Task, seed: int, *callbacks: pl.Callback) -> tuple[Learner, float]:
    """Train, and return the seconds that it took."""
    start = time.perf_counter()
    learner = train(task, seed, *callbacks)
    return learner, time.perf_counter() - start


def loader(data: TensorDataset, batch_size: int | None = None) -> DataLoader[tuple[Tensor, ...]]:
    """Return a loader in the order of the data, by default of a single batch."""
    return DataLoader(data, batch_size or len(data))
