"""The recorded run of a task, and the scores of methods on it."""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from lds_retraining import Weights, initial_weights, retrain, stacked, state_of
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
# As a share of the distance that training moved the weights: rounding errors grow with it.
TOLERANCE = 1e-2


@dataclass(frozen=True)
class Run:
    """A recorded training.

    Attributes:
        task: The task that was trained.
        learner: The trained module.
        store: The recorded run.
        seconds: Time of the recorded training.
        seed: Seed of the initial weights and of the order.
    """

    task: Task
    learner: Learner
    store: HDF5Store
    seconds: float
    seed: int

    @property
    def batches(self) -> list[Tensor]:
        """Indices of the samples of each step, in order."""
        return [step.sample_ids for step in self.store]

    @property
    def initial(self) -> Weights:
        """The weights that training started from."""
        return initial_weights(self.task, self.seed)

    @property
    def final(self) -> Weights:
        """The weights and buffers that training ended with."""
        return state_of(self.learner.network)

    @property
    def has_one_label(self) -> bool:
        """Whether each sample has one label."""
        terms = self.store[0].terms
        return terms is not None and float(terms.max()) == 1

    @property
    def has_one_class(self) -> bool:
        """Whether each sample has one label, a class, as TRAK requires."""
        return self.has_one_label and self.task.has_classes

    @property
    def mebibytes(self) -> float:
        """Size of the store."""
        return self.store.size_on_disk / 2**20

    def scores(self, method: Attributor, at: Moment | None) -> Tensor:
        """Return the scores of the task's queries from the run."""
        queries = self._queries()
        scores = attribute(self.store, self.learner, queries, method=method, at=at, progress=False)
        assert torch.equal(scores.train_ids, torch.arange(len(self.task.data().train)))
        return scores.values

    def scores_by_gradients(self, method: FullInfluenceFunction) -> Tensor:
        """Return the scores from whole gradients at the final weights, without a run."""
        return attribute_by_gradients(
            self.learner, self._loader(), self._queries(), method=method, progress=False
        ).values

    def scores_along(self, method: FullInfluenceFunction, at: Moment) -> Tensor:
        """Return the scores from whole gradients at the run's snapshots."""
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

    def _distance(self, first: Weights, second: Weights) -> float:
        """Return the Euclidean distance between the recorded parameters.

        A bias in front of a batch norm is not recorded. Adam moves it by rounding errors.
        """
        blocks = self.store.recipe.recorded_blocks
        names = [name.removeprefix("network.") for block in blocks for name in block.parameters]
        squares = [(first[name] - second[name]).square().sum() for name in names]
        return float(torch.stack(squares).sum().sqrt())

    def require_replayable(self) -> None:
        """Check that retraining on all samples ends at the run's weights.

        Raises:
            RuntimeError: If it does not.
        """
        everything = torch.ones(1, len(self.task.data().train))
        replayed = retrain(self.task, stacked(self.initial, 1), self.batches, everything)
        gap = self._distance({name: value[0] for name, value in replayed.items()}, self.final)
        share = gap / self._distance(self.initial, self.final)
        if share > TOLERANCE:
            raise RuntimeError(
                f"Retraining {self.task.title!r} on all samples ends {share:.1%} of the training "
                f"distance away from the recorded weights; expected at most {TOLERANCE:.0%}. The "
                "truth would be that of another run."
            )


def record(task: Task, folder: Path, settings: Mapping[str, object], seed: int) -> Run:
    """Train with Lightning and the recorder."""
    snapshots = max(1, task.steps // SNAPSHOTS)
    recorder = GradientRecorder(folder, existing="replace", snapshots=snapshots, **settings)
    start = time.perf_counter()
    learner = train(task, seed, recorder)
    return Run(task, learner, HDF5Store.open(folder), time.perf_counter() - start, seed)
