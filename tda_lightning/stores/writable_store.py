"""WritableStore: abstract base class of a store that a training can write to."""

from __future__ import annotations

from abc import abstractmethod

import torch

from tda_lightning.stores.recipe import Recipe
from tda_lightning.stores.step import Step
from tda_lightning.stores.store import Store, Weights


class WritableStore(Store):
    """A store to write to: :meth:`begin` or :meth:`resume`, then :meth:`append`, :meth:`seal`."""

    @property
    @abstractmethod
    def run_id(self) -> str | None:
        """Unique, permanent id of the stored run, or ``None`` if there is none."""

    def join(self, rank: int, ranks: int) -> None:
        """Write as one of several processes. Process 0 begins the run; the others resume it.

        Raises:
            ValueError: If the store does not support several processes.
        """
        raise ValueError(
            f"A `{type(self).__name__}` cannot be written by {ranks} processes; expected a store "
            "that supports this. Record into a folder, or train with `Trainer(devices=1)`."
        )

    def refresh(self) -> None:
        """Load the steps sealed by other processes; does nothing by default."""

    @abstractmethod
    def begin(self, recipe: Recipe) -> None:
        """Start a new run.

        Raises:
            FileExistsError: If the store already holds a run, or its path holds something else.
        """

    def amend(self, recipe: Recipe) -> None:
        """Replace the recipe of a run that has no steps yet; later, ids and names may be added.

        Raises:
            ValueError: If the store does not support this.
        """
        raise ValueError(
            f"A `{type(self).__name__}` cannot change the recipe of a run; expected a store that "
            "can, since the first batch shows the cost of recording and what can be recorded. Set "
            "`every_n_steps=` instead of `max_overhead=`, and choose `layers=`."
        )

    @abstractmethod
    def resume(self, index: int) -> None:
        """Continue the stored run: keep the steps before ``index`` and drop the others.

        Args:
            index: Number of optimizer steps that remain valid.
        """

    @abstractmethod
    def clear(self) -> None:
        """Delete the stored run, if any.

        Raises:
            FileExistsError: If the path holds something other than a run.
        """

    def bytes_of(self, dtype: torch.dtype) -> int:
        """Return the number of bytes per row entry that was computed in ``dtype``."""
        return dtype.itemsize

    @abstractmethod
    def append(self, step: Step) -> None:
        """Add a step to the run. It is durable and readable once sealed."""

    @abstractmethod
    def seal(self) -> None:
        """Make all appended steps durable and readable."""

    def renew(self) -> None:
        """Show other trainings that this one is alive; does nothing by default."""

    def release(self) -> None:
        """End writing, so that another training may write; does nothing by default."""

    def keep_fingerprint(self, fingerprint: str) -> None:
        """Store the fingerprint of the weights at the end of the training; optional."""

    def keep_weights(self, index: int, weights: Weights) -> None:
        """Store the model state before a step.

        Args:
            index: Number of optimizer steps taken so far.
            weights: Result of ``state_dict``, on the CPU; the store may keep these tensors.

        Raises:
            ValueError: If the store does not support snapshots.
        """
        raise ValueError(
            f"A `{type(self).__name__}` does not support snapshots; expected a store that does. "
            "Record into a folder, or without `snapshots`."
        )
