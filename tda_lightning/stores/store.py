"""Store: a sequence of steps, and the recipe they were made by, on some medium."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import overload

import torch
from jaxtyping import Int
from torch import Tensor

from tda_lightning.stores.recipe import Recipe, ids_of
from tda_lightning.stores.step import Audit, Preconditioner, Step, StepFacts

Weights = Mapping[str, Tensor]


class Store(Sequence[Step], ABC):
    """A recorded run: ``len``, index, slice, ``reversed`` and iteration over :class:`Step`.

    Steps are read when they are asked for. A slice is a view that reads just as lazily, so
    ``attribute(store[:100], ...)`` attributes to the first hundred steps.
    """

    @property
    @abstractmethod
    def recipe(self) -> Recipe:
        """How the sketches were made."""

    @abstractmethod
    def __len__(self) -> int:
        """Return the number of readable steps."""

    @abstractmethod
    def read(self, position: int) -> Step:
        """Return the step at a position in ``range(len(self))``."""

    def facts_at(self, position: int) -> StepFacts:
        """Return what is known of the step at a position besides its rows.

        A store that can spare reading those should.
        """
        return self.read(position)

    @property
    def facts(self) -> Sequence[StepFacts]:
        """What is known of the steps besides their rows, as a sequence that reads as lazily."""
        return _Facts(self)

    def train_ids(self) -> Int[Tensor, " n_train"]:
        """Return the ids of all training samples, sorted: also of those never drawn, if known."""
        if self.recipe.train_ids is not None:
            return ids_of(self.recipe.train_ids)
        return self.visited_ids()

    def visited_ids(self) -> Int[Tensor, " n"]:
        """Return the ids of the samples that took part in a step, sorted."""
        ids: Tensor = torch.unique(torch.cat([torch.unique(one.sample_ids) for one in self.facts]))
        return ids

    def preconditioner(self, position: int = -1) -> Preconditioner | None:
        """Return the coordinates of the rows of the step at a position, or ``None`` for raw rows.

        Queries about that step are to be recorded in the same ones.
        """
        for earlier in range(range(len(self))[position], -1, -1):
            found = self.facts_at(earlier).preconditioner
            if found is not None:
                return found
        return None

    def snapshots(self) -> list[int]:
        """Return the steps before which the weights were kept, in order; by default none."""
        return []

    def weights_at(self, index: int) -> Weights:
        """Return the model's state before a step, as it was kept.

        Raises:
            ValueError: If it was not.
        """
        require_snapshot(self.snapshots(), index)
        raise NotImplementedError(
            f"`{type(self).__name__}` lists snapshots, and does not say what they hold; expected "
            "`weights_at` beside `snapshots`."
        )

    def __repr__(self) -> str:
        """Show the kind of store and its length, not its steps."""
        return f"{type(self).__name__}({len(self)} steps)"

    def audits(self) -> list[Audit]:
        """Return what the audits of the run found, in order."""
        return [one.audit for one in self.facts if one.audit is not None]

    @overload
    def __getitem__(self, key: int) -> Step: ...
    @overload
    def __getitem__(self, key: slice) -> Store: ...
    def __getitem__(self, key: int | slice) -> Step | Store:
        """Return a step, or a view of several.

        Raises:
            ValueError: If a slice goes backwards.
        """
        positions = range(len(self))[key]
        if isinstance(positions, range) and positions.step < 0:
            raise ValueError(
                f"The slice has a step of {positions.step}; expected a positive one, since a slice "
                "of a run is asked as a training of its own, and none runs backwards. Go through "
                "steps from the last to the first with `reversed(run)`."
            )
        return self.read(positions) if isinstance(positions, int) else StoreSlice(self, positions)


class _Facts(Sequence[StepFacts]):
    def __init__(self, store: Store) -> None:
        self._store = store

    def __len__(self) -> int:
        return len(self._store)

    @overload
    def __getitem__(self, key: int) -> StepFacts: ...
    @overload
    def __getitem__(self, key: slice) -> Sequence[StepFacts]: ...
    def __getitem__(self, key: int | slice) -> StepFacts | Sequence[StepFacts]:
        if isinstance(key, slice):
            return self._store[key].facts
        return self._store.facts_at(range(len(self))[key])


class StoreSlice(Store):
    """Some of the steps of another store, in an order of their own.

    Args:
        store: The store to read from.
        positions: Which of its steps.
    """

    def __init__(self, store: Store, positions: range) -> None:
        self._store = store
        self._positions = positions

    @property
    def recipe(self) -> Recipe:
        """How the sketches were made."""
        return self._store.recipe

    def __len__(self) -> int:
        """Return the number of steps in the view."""
        return len(self._positions)

    def read(self, position: int) -> Step:
        """Return the step at a position of the view."""
        return self._store.read(self._positions[position])

    def facts_at(self, position: int) -> StepFacts:
        """Return what is known of a step of the view besides its rows."""
        return self._store.facts_at(self._positions[position])

    def preconditioner(self, position: int = -1) -> Preconditioner | None:
        """Return the coordinates of a step of the view: they may have begun before it."""
        return self._store.preconditioner(self._positions[position])

    def snapshots(self) -> list[int]:
        """Return the steps before which the weights were kept: also those outside of the view."""
        return self._store.snapshots()

    def weights_at(self, index: int) -> Weights:
        """Return the model's state before a step, as it was kept."""
        return self._store.weights_at(index)


class WritableStore(Store):
    """A store to fill: :meth:`begin` or :meth:`resume`, then :meth:`append` and :meth:`seal`."""

    @property
    @abstractmethod
    def run_id(self) -> str | None:
        """What names the run that is there, for good, or ``None`` if there is none."""

    def join(self, rank: int, ranks: int) -> None:
        """Write as one of several processes. Process 0 begins the run, the others resume it.

        Args:
            rank: Number of this process.
            ranks: How many there are.

        Raises:
            ValueError: If the store cannot be shared.
        """
        raise ValueError(
            f"A `{type(self).__name__}` cannot be written by {ranks} processes; expected a store "
            "that they can share. Record into a folder, or train with `Trainer(devices=1)`."
        )

    def refresh(self) -> None:
        """See what other processes have sealed; by default there are none."""

    @abstractmethod
    def begin(self, recipe: Recipe) -> None:
        """Start a new run.

        Raises:
            FileExistsError: If there is a run already, or something else in its place.
        """

    def amend(self, recipe: Recipe) -> None:
        """Put another recipe in the place of that of a run that has just begun.

        Args:
            recipe: The same but for what is found out in the first batch.

        Raises:
            ValueError: If the store cannot do that.
        """
        raise ValueError(
            f"A `{type(self).__name__}` keeps the recipe that a run was begun with; expected a "
            "store that lets the stride be chosen in the first batch. Set `every_n_steps=` instead "
            "of `max_overhead=`."
        )

    @abstractmethod
    def resume(self, index: int) -> None:
        """Continue the run that is there: keep the steps before an index, and drop the others.

        Args:
            index: Number of optimizer steps that stand.
        """

    @abstractmethod
    def clear(self) -> None:
        """Delete the run that is there, if any.

        Raises:
            FileExistsError: If what is there is not a run.
        """

    def bytes_of(self, dtype: torch.dtype) -> int:
        """Return how many bytes the store takes for a number of a row of this format."""
        return dtype.itemsize

    @abstractmethod
    def append(self, step: Step) -> None:
        """Add a step to the run. It is safe, and readable, once sealed."""

    @abstractmethod
    def seal(self) -> None:
        """Make every step appended so far safe and readable."""

    def keep_weights(self, index: int, weights: Weights) -> None:
        """Keep the model's state before a step.

        Args:
            index: Number of optimizer steps taken so far.
            weights: What ``state_dict`` returns, on the CPU; the store may keep these tensors.
        """
        raise ValueError(
            f"A `{type(self).__name__}` keeps no weights; expected a store that does. Record into "
            "a folder, or without `snapshots`."
        )


def require_snapshot(known: list[int], index: int) -> None:
    """Raise unless there is a snapshot of a step.

    Raises:
        ValueError: Saying which there are.
    """
    if index not in known:
        shown = ", ".join(map(str, known[:5])) + (f", ... {known[-1]}" if len(known) > 5 else "")
        raise ValueError(
            f"The run has no snapshot of the weights before step {index}; expected one of "
            f"{shown or 'none at all'}. Record with `GradientRecorder(..., snapshots=[{index}])`, "
            "or take over checkpoints with `add_snapshots`."
        )
