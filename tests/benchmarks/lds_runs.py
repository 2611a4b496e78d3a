"""The recorded run of a task, and its own truth."""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from lds_retraining import Weights, initial_weights, retrain, stacked
from lds_tasks import Learner, Task, train
from torch import Tensor
from torch.utils.data import DataLoader

from tda_lightning import (
    FullInfluenceFunction,
    GradientRecorder,
    HDF5Store,
    attribute,
    attribute_by_gradients,
)
from tda_lightning.attribution import Attributor
from tda_lightning.stores.snapshots import Moment

SNAPSHOTS = 20
# Of the distance that training went: rounding grows along the way.
TOLERANCE = 1e-2


@dataclass(frozen=True)
class Run:
    """A training that was recorded.

    Attributes:
        task: What was trained.
        learner: The trained module.
        store: What was recorded.
        seconds: How long the recorded training took.
        seed: What it began with.
    """

    task: Task
    learner: Learner
    store: HDF5Store
    seconds: float
    seed: int

    @property
    def batches(self) -> list[Tensor]:
        """Places of the samples that each step drew, in order."""
        return [step.sample_ids for step in self.store]

    @property
    def initial(self) -> Weights:
        """The weights that training started from."""
        return initial_weights(self.task, self.seed)

    @property
    def final(self) -> Weights:
        """The weights that training ended with."""
        network = self.learner.network
        return {name: value.detach() for name, value in network.named_parameters()}

    @property
    def has_one_label(self) -> bool:
        """Whether the loss of a sample is that of one label, as TRAK wants it."""
        terms = self.store[0].terms
        return terms is not None and float(terms.max()) == 1

    @property
    def mebibytes(self) -> float:
        """Size of the store."""
        return self.store.size_on_disk / 2**20

    def scores(self, method: Attributor, at: Moment) -> Tensor:
        """Ask the run about the task's queries."""
        queries = self._queries()
        found = attribute(self.store, self.learner, queries, method=method, at=at, progress=False)
        assert torch.equal(found.train_ids, torch.arange(len(self.task.data().train)))
        return found.values

    def scores_by_gradients(self, method: FullInfluenceFunction) -> Tensor:
        """Ask the final weights about the task's queries, with whole gradients and no run."""
        return attribute_by_gradients(
            self.learner, self._loader(), self._queries(), method=method, progress=False
        ).values

    def scores_along(self, method: FullInfluenceFunction, at: Moment) -> Tensor:
        """Ask the run's snapshots about the task's queries, with whole gradients."""
        return attribute_by_gradients(
            self.learner,
            self._loader(),
            self._queries(),
            run=self.store,
            method=method,
            at=at,
            progress=False,
        ).values

    def _loader(self) -> DataLoader[tuple[Tensor, ...]]:
        return DataLoader(self.task.data().train, self.task.batch_size)

    def _queries(self) -> tuple[Tensor, ...]:
        return self.task.data().queries.tensors

    def require_replayable(self) -> None:
        """Make sure that retraining without leaving anything out ends at the run's weights.

        Raises:
            RuntimeError: If it does not.
        """
        everything = torch.ones(1, len(self.task.data().train))
        replayed = retrain(self.task, stacked(self.initial, 1), self.batches, everything)
        gap = distance({name: value[0] for name, value in replayed.items()}, self.final)
        share = gap / distance(self.initial, self.final)
        if share > TOLERANCE:
            raise RuntimeError(
                f"Retraining {self.task.title!r} on all samples ends {share:.1%} of its way from "
                f"where the recorded run ended; expected at most {TOLERANCE:.0%}. The truth would "
                "be that of another run."
            )


def distance(one: Weights, other: Weights) -> float:
    """Return the Euclidean distance of all parameters together."""
    squares = [(one[name] - other[name]).square().sum() for name in one]
    return float(torch.stack(squares).sum().sqrt())


def record(task: Task, folder: Path, settings: Mapping[str, object], seed: int) -> Run:
    """Train with Lightning and the recorder."""
    snapshots = max(1, task.steps // SNAPSHOTS)
    recorder = GradientRecorder(folder, existing="replace", snapshots=snapshots, **settings)
    start = time.perf_counter()
    learner = train(task, seed, recorder)
    return Run(task, learner, HDF5Store.open(folder), time.perf_counter() - start, seed)
