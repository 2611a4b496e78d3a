"""Store: abstract base class of a recorded run, a sequence of steps; and views of one."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import overload

import torch
from jaxtyping import Int
from torch import Tensor

from tda_lightning.stores.recipe import Recipe, count_of, ids_of
from tda_lightning.stores.step import Audit, Preconditioner, Step, StepFacts

Weights = Mapping[str, Tensor]
# The scores of unvisited samples are zero, and take memory and time nevertheless.
MAX_UNVISITED = 2**24


class Store(Sequence[Step], ABC):
    """A recorded run: ``len``, index, slice, ``reversed`` and iteration over :class:`Step`.

    Steps are read on access. A slice is a lazy view, so ``attribute(store[:100], ...)`` attributes
    to the first hundred steps.
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

    def __iter__(self) -> Iterator[Step]:
        # `Sequence.__iter__` would take an `IndexError` of `read` for the end of the run.
        return (self.read(position) for position in range(len(self)))

    def facts_at(self, position: int) -> StepFacts:
        """Return the step at a position without its rows.

        Stores should override this method if they can avoid reading the rows.
        """
        return self.read(position)

    @property
    def facts(self) -> Sequence[StepFacts]:
        """The steps without their rows, as a lazy sequence."""
        return _Facts(self)

    @property
    def n_train(self) -> int:
        """Number of training samples, including unvisited ones if known."""
        ranges = self.recipe.train_ids
        return len(self.visited_ids()) if ranges is None else count_of(ranges)

    def train_ids(self) -> Int[Tensor, " n_train"]:
        """Return the sorted ids of all training samples, including unvisited ones if known.

        If more than 2**24 samples were never visited, it returns the visited ones, and warns.
        """
        ranges = self.recipe.train_ids
        if ranges is not None and count_of(ranges) <= MAX_UNVISITED:
            return ids_of(ranges)
        visited = self.visited_ids()
        if ranges is None:
            return visited
        n_unvisited = count_of(ranges) - len(visited)
        if n_unvisited <= MAX_UNVISITED:
            return ids_of(ranges)
        warnings.warn(
            f"This run visited {len(visited):,} of {count_of(ranges):,} training samples; expected "
            f"at most {MAX_UNVISITED:,} without a visit. The {n_unvisited:,} others are left out: "
            "their scores are all zero.",
            stacklevel=2,
        )
        return visited

    def visited_ids(self) -> Int[Tensor, " n"]:
        """Return the sorted ids of the samples with at least one visit."""
        parts = [torch.unique(facts.sample_ids) for facts in self.facts]
        ids: Tensor = torch.unique(torch.cat(parts))
        return ids

    def preconditioner(self, position: int = -1) -> Preconditioner | None:
        """Return the coordinates of the rows of the step at a position, or ``None`` for raw rows.

        Queries about that step must be recorded in the same coordinates.
        """
        for earlier in range(range(len(self))[position], -1, -1):
            preconditioner = self.facts_at(earlier).preconditioner
            if preconditioner is not None:
                return preconditioner
        return None

    def snapshots(self) -> list[int]:
        """Return the indices of the steps with a snapshot, in order; by default none."""
        return []

    def weights_at(self, index: int) -> Weights:
        """Return the stored model state before a step.

        Raises:
            ValueError: If the run has no snapshot before that step.
        """
        require_snapshot(self.snapshots(), index)
        raise NotImplementedError(
            f"`{type(self).__name__}` implements `snapshots` but not `weights_at`; expected both. "
            "Implement `weights_at`."
        )

    def __repr__(self) -> str:
        return f"{type(self).__name__}({len(self)} steps)"

    @property
    def final_fingerprint(self) -> str | None:
        """Fingerprint of the weights at the end of the training; ``None`` if unknown."""
        return None

    def audits(self) -> list[Audit]:
        """Return the audits of the run, in order."""
        return [step.audit for step in self.facts if step.audit is not None]

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
                f"The slice has a step of {positions.step}; expected a positive one, since methods "
                "treat a slice as a training. To iterate from the last step to the first, use "
                "`reversed(run)`."
            )
        return self.read(positions) if isinstance(positions, int) else StoreSlice(self, positions)


class _Facts(Sequence[StepFacts]):
    def __init__(self, store: Store) -> None:
        self._store = store

    def __len__(self) -> int:
        return len(self._store)

    def __repr__(self) -> str:
        return f"facts of {len(self)} steps, without their rows"

    def __iter__(self) -> Iterator[StepFacts]:
        return (self._store.facts_at(position) for position in range(len(self)))

    @overload
    def __getitem__(self, key: int) -> StepFacts: ...
    @overload
    def __getitem__(self, key: slice) -> Sequence[StepFacts]: ...
    def __getitem__(self, key: int | slice) -> StepFacts | Sequence[StepFacts]:
        if isinstance(key, slice):
            return self._store[key].facts
        return self._store.facts_at(range(len(self))[key])


class StoreSlice(Store):
    """View of the steps at some positions of another store."""

    def __init__(self, store: Store, positions: range) -> None:
        self._store = store
        self._positions = positions

    @property
    def recipe(self) -> Recipe:
        """How the sketches were made."""
        return self._store.recipe

    def __len__(self) -> int:
        return len(self._positions)

    def read(self, position: int) -> Step:
        """Return the step at a position of the view."""
        return self._store.read(self._positions[position])

    def facts_at(self, position: int) -> StepFacts:
        """Return a step of the view without its rows."""
        return self._store.facts_at(self._positions[position])

    @property
    def final_fingerprint(self) -> str | None:
        """That of the run if the view has its last step; unknown otherwise."""
        has_end = len(self._store) - 1 in self._positions
        return self._store.final_fingerprint if has_end else None

    def preconditioner(self, position: int = -1) -> Preconditioner | None:
        """Return the coordinates of a step of the view; they may be set before the view."""
        return self._store.preconditioner(self._positions[position])

    def snapshots(self) -> list[int]:
        """Return the indices of all snapshots, including those outside the view."""
        return self._store.snapshots()

    def weights_at(self, index: int) -> Weights:
        """Return the stored model state before a step."""
        return self._store.weights_at(index)


def require_snapshot(snapshots: list[int], index: int) -> None:
    """Check that there is a snapshot before the step ``index``."""
    if index not in snapshots:
        shown = ", ".join(map(str, snapshots[:5]))
        if len(snapshots) > 5:
            shown += f", ... {snapshots[-1]}"
        expected = f"expected one of {shown}" if shown else "it has none at all"
        raise ValueError(
            f"The run has no snapshot of the weights before step {index}; {expected}. Record with "
            f"`GradientRecorder(..., snapshots=[{index}])`, or add checkpoints with "
            "`add_snapshots`."
        )
