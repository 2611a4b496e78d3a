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
        run: The same training with a recorder at its defaults.
        paths: Checkpoints, one per epoch, of weights and learning rates.
        others: State dicts of five more trainings, for ensembles.
        folder: Where libraries may write.
        times: Seconds of the training alone, with checkpoints, and with the recorder.
    """

    run: Run
    paths: list[str]
    others: list[Weights]
    folder: Path
    times: tuple[float, float, float]

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


def train_once(task: Task, folder: Path, seed: int, others: Weights) -> Trained:
    """Train three times with the same result: alone, with checkpoints and with a recorder."""
    folder.mkdir(parents=True)
    _, alone = timed(task, seed)
    checkpoints = Checkpoints(folder)
    plain, with_checkpoints = timed(task, seed, checkpoints)
    store = folder / "run.tda"
    learner, recorded = timed(task, seed, GradientRecorder(store, existing="replace"))
    run = Run(task, learner, HDF5Store.open(store), recorded, seed)
    for name, value in plain.network.state_dict().items():
        assert torch.equal(value, run.final[name]), name
    run.require_replayable()
    members = range(len(next(iter(others.values()))))
    models = [{name: value[member] for name, value in others.items()} for member in members]
    return Trained(run, checkpoints.paths, models, folder, (alone, with_checkpoints, recorded))


def timed(task: Task, seed: int, *callbacks: pl.Callback) -> tuple[Learner, float]:
    """Train, and return the seconds that it took."""
    start = time.perf_counter()
    learner = train(task, seed, *callbacks)
    return learner, time.perf_counter() - start


def loader(data: TensorDataset, batch_size: int | None = None) -> DataLoader[tuple[Tensor, ...]]:
    """Return a loader in the order of the data, by default of a single batch."""
    return DataLoader(data, batch_size or len(data))
