"""Keeper: begins a run or continues it, and keeps its steps as long as there is room for them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from pytorch_lightning.utilities import rank_zero_warn
from torch import Tensor

from tda_lightning.callbacks.lightning_types import LightningModule, Trainer
from tda_lightning.stores import WritableStore
from tda_lightning.stores.recipe import Recipe
from tda_lightning.stores.step import Preconditioner, Step


class RunWriter:
    """Writes the steps of one training into a store.

    Args:
        store: Where they go.
        existing: What to do with a run in the store that the training does not continue.

    Attributes:
        has_failed: Whether the store could not be written to; nothing is kept from then on.
    """

    def __init__(self, store: WritableStore, existing: Literal["refuse", "replace"]) -> None:
        self._store = store
        self._existing = existing
        self._run_id: str | None = None
        self._count = 0
        self._checkpoint: dict[str, Any] = {}
        self.has_failed = False

    def begin(
        self, trainer: Trainer, recipe: Recipe
    ) -> tuple[dict[str, Any], Preconditioner | None]:
        """Begin the run, or continue the one that this training has begun.

        Returns:
            What a checkpoint knows of the run, and the coordinates of its last step, if it has any;
            nothing, if it was begun anew.

        Raises:
            FileExistsError: If the store holds another run, or something else.
            ValueError: If the store holds the run, but under another recipe.
        """
        taken = trainer.global_step
        if trainer.world_size > 1:
            self._store.join(trainer.global_rank, trainer.world_size)
        found: BaseException | bool = False
        if trainer.is_global_zero:
            found = _caught(lambda: self._begin_or_continue(recipe, taken))
        # All processes fail together, or wait for each other for ever.
        found = trainer.strategy.broadcast(found)
        if isinstance(found, BaseException):
            raise found
        if not trainer.is_global_zero:
            self._store.resume(taken)
            self._count = len(self._store)
        if found:
            self._warn_of_missing(trainer)
        self._run_id = self._store.run_id
        checkpoint, self._checkpoint = self._checkpoint, {}
        preconditioner = self._store.preconditioner() if self._count else None
        # All processes go on alike, whatever one of them has lost.
        return checkpoint if found else {}, trainer.strategy.broadcast(preconditioner)

    def finish(self, trainer: Trainer) -> None:
        """See what all processes have kept, once they all have."""
        if trainer.world_size > 1:
            trainer.strategy.barrier("tda_lightning")
            self._store.refresh()

    def stride_of_run(self, trainer: Trainer) -> int | None:
        """Return the stride of the run that :meth:`begin` is going to continue, if it is."""
        is_there = self._is_continued(trainer.global_step)
        return self._store.recipe.every_n_steps if is_there else None

    def amend(self, recipe: Recipe) -> None:
        """Put another recipe in the place of that of a run which holds no steps yet."""
        self._try(lambda: self._store.amend(recipe))

    def append(self, step: Step) -> None:
        """Keep a step."""
        if self._try(lambda: self._store.append(step)):
            self._count += 1

    def keep_weights(
        self, trainer: Trainer, model: LightningModule, chosen: int | Sequence[int]
    ) -> None:
        """Keep the weights before the step to come, if it is one of the chosen ones.

        Args:
            trainer: The trainer.
            model: The model.
            chosen: Every how many steps, 0 for never; or which steps.
        """
        index = trainer.global_step
        if isinstance(chosen, int):
            chosen = [index] if chosen and index % chosen == 0 else []
        if index not in chosen or not trainer.is_global_zero or index in self._store.snapshots():
            return
        state = model.state_dict()
        weights = {k: v.detach().cpu().clone() for k, v in state.items() if isinstance(v, Tensor)}
        self._try(lambda: self._store.keep_weights(index, weights))

    def seal(self) -> None:
        """Make all steps safe."""
        self._try(self._store.seal)

    def seal_together(self, trainer: Trainer) -> None:
        """Make all steps of all processes safe; to be called by all of them."""
        self.seal()
        if trainer.world_size > 1:
            trainer.strategy.barrier("tda_lightning")

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint should know of the run: builtins only."""
        return {} if self._run_id is None else {"run": self._run_id, "steps": self._count}

    def load_state(self, state: dict[str, Any]) -> None:
        """Take what a checkpoint knows of the run that :meth:`begin` is going to continue."""
        self._checkpoint = dict(state)

    def _begin_or_continue(self, recipe: Recipe, taken: int) -> bool:
        """Return whether the run is continued."""
        self._count = 0
        if self._is_continued(taken):
            self._continue(recipe, taken)
            return True
        if self._existing == "replace":
            self._store.clear()
        elif taken and self._store.run_id is not None:
            raise FileExistsError(
                "The checkpoint belongs to another recorded run than the one in the store; "
                "expected the store that was recorded into when it was saved. Name that store, or "
                "record into a new one."
            )
        self._store.begin(recipe)
        if taken:
            rank_zero_warn(
                f"GradientRecorder: the {taken:,} steps before this checkpoint are not in the "
                "store; recording what comes after them."
            )
        return False

    def _is_continued(self, taken: int) -> bool:
        found, expected = self._store.run_id, self._checkpoint.get("run")
        return taken > 0 and found is not None and expected in (None, found)

    def _continue(self, recipe: Recipe, taken: int) -> None:
        self._store.recipe.require_continued_by(recipe)
        self._store.resume(taken)
        self._count = len(self._store)

    def _warn_of_missing(self, trainer: Trainer) -> None:
        missing = self._checkpoint.get("steps", self._count) - self._count
        if trainer.world_size > 1:
            # What one process has lost of a step, no other can show.
            own = torch.tensor(missing, device=trainer.strategy.root_device)
            missing = int(trainer.strategy.reduce(own, reduce_op="max"))
        if missing:
            rank_zero_warn(
                f"GradientRecorder: the store lacks {missing:,} steps that were recorded before "
                "this checkpoint; continuing without them."
            )

    def _try(self, write: Callable[[], None]) -> bool:
        """Write, unless writing has failed before; return whether it went well."""
        if self.has_failed:
            return False
        try:
            write()
        except OSError as error:
            self.has_failed = True
            rank_zero_warn(
                f"GradientRecorder: the store cannot be written to any more ({error}). Training "
                "goes on; recording has stopped, and what was sealed before stays readable."
            )
        return not self.has_failed


def _caught(work: Callable[[], bool]) -> BaseException | bool:
    try:
        return work()
    except Exception as error:
        return error
