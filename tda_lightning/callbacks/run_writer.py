"""RunWriter: begin or continue a run, and write its steps until the store fails."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any, Literal

import torch
from pytorch_lightning.utilities import rank_zero_warn
from torch import Tensor

from tda_lightning.callbacks.checks import is_from_signal_handler
from tda_lightning.callbacks.lightning_trainer import LightningModule, Trainer, from_first_process
from tda_lightning.callbacks.messages import inform
from tda_lightning.gradients.row_recorder import RowRecorder
from tda_lightning.passes.model_state import fingerprint
from tda_lightning.stores import WritableStore
from tda_lightning.stores.recipe import Recipe
from tda_lightning.stores.step import Preconditioner, Step


class RunWriter:
    """Writes the steps of one training into a store, until ``has_failed``.

    ``existing`` decides about a run in the store that the training does not continue. Warnings name
    the ``owner``, a callback. The training has started with its ``first_step``.
    """

    def __init__(
        self, store: WritableStore, existing: Literal["refuse", "replace"], owner: str
    ) -> None:
        self._store = store
        self._owner = owner
        self._existing = existing
        self._run_id: str | None = None
        self._stored: str | None = None  # Id of the run in the store before training.
        self._count = 0
        self._states: list[Mapping[str, Any]] = []  # of the runs that a checkpoint refers to
        self._normalized: list[set[str]] = []  # Until the first step.
        self._has_warned_of_non_finite = False
        self._place = ""  # " in process 1", of several
        self.first_step = 0
        self.has_failed = False

    def begin(
        self, trainer: Trainer, recipe: Recipe
    ) -> tuple[dict[str, Any], Preconditioner | None]:
        """Begin the run, or continue the run that this training has begun.

        Returns:
            The state of the run in the checkpoint and the preconditioner of its last step, if it is
            continued; an empty state and ``None`` for a new run.

        Raises:
            FileExistsError: If the store holds another run, or something else.
            ValueError: If the store holds the run, but under another recipe.
        """
        step = self.first_step = trainer.global_step
        if trainer.world_size > 1:
            self._store.join(trainer.global_rank, trainer.world_size)
            self._place = f" in process {trainer.global_rank}"
        is_continued = from_first_process(trainer, lambda: self._begin_or_continue(recipe, step))
        if not trainer.is_global_zero:
            self._store.resume(step)
            self._count = len(self._store)
        self._run_id = self._store.run_id
        checkpoint = self._state_of(self._run_id)
        self._states = []
        if is_continued:
            self._warn_of_missing_steps(trainer, checkpoint.get("steps", self._count))
            if self.has_failed or checkpoint.get("has_stopped"):
                rank_zero_warn(
                    f"{self._owner}: recording had stopped before step {step:,}; the steps from "
                    "there to here are not in the store, and answers do not cover them."
                )
        self.has_failed = False
        preconditioner = self._store.preconditioner() if self._count else None
        # All processes use the same preconditioner, even if one of them has lost steps.
        return checkpoint if is_continued else {}, trainer.strategy.broadcast(preconditioner)

    def move_to(self, store: WritableStore) -> None:
        """Write the next run into another store."""
        self._store, self._run_id, self._stored, self._count = store, None, None, 0

    def begun_runs(self) -> set[str]:
        """Return ids of runs that the training may continue: the checkpoint's, or its own."""
        own = set() if self._run_id is None else {self._run_id}
        return {state["run"] for state in self._states} or own

    @property
    def run_id(self) -> str | None:
        """Id of the run that is written; before :meth:`begin`, of the one in the store."""
        if self._run_id is None and self._stored is None:
            with suppress(OSError, ValueError):  # `begin` names what is wrong.
                self._stored = self._store.run_id
        return self._run_id or self._stored

    def finish(self, trainer: Trainer) -> None:
        """Wait for all processes, and read their steps."""
        self.agree(trainer, self.seal)
        if trainer.world_size > 1:
            self._store.refresh()

    def continued_recipe(self, trainer: Trainer) -> Recipe | None:
        """Return the recipe of the run that :meth:`begin` will continue, or ``None``."""
        return self._store.recipe if self._is_continued(trainer.global_step) else None

    def amend(self, recipe: Recipe) -> None:
        """Replace the recipe of a run that holds no steps yet."""
        self._try(lambda: self._store.amend(recipe))

    def watched(self, rows: RowRecorder) -> RowRecorder:
        """Note the names of the parameters that batch norms will be found to follow."""
        self._normalized.append(rows.normalized)
        return rows

    def append(self, step: Step) -> None:
        """Write a step. The first one completes the recipe with what its batches have shown."""
        self._warn_of_non_finite(step)
        names = sorted(set().union(*self._normalized))
        if names and not self._count and not self.has_failed:
            self.amend(replace(self._store.recipe, normalized=tuple(names)))
        self._normalized = []
        if self._try(lambda: self._store.append(step)):
            self._count += 1

    def save_snapshot(
        self,
        trainer: Trainer,
        model: LightningModule,
        chosen: int | Sequence[int],
        finish_steps: Callable[[], None],
    ) -> None:
        """Write the weights before the next step, after all steps before, if a snapshot is due.

        The user has ``chosen`` a stride (0 for none), or the indices of steps.
        """
        index = trainer.global_step
        if isinstance(chosen, int):
            chosen = [index] if chosen and index % chosen == 0 else []
        if index not in chosen or not trainer.is_global_zero or self.has_failed:
            return
        finish_steps()
        if not self._try(lambda: self._keep_weights(index, model)):
            with suppress(Exception):  # Rows are far smaller than weights, and may still fit.
                self._store.seal()

    def _keep_weights(self, index: int, model: LightningModule) -> None:
        if index in self._store.snapshots():
            return
        state = model.state_dict()
        weights = {k: v.detach().cpu().clone() for k, v in state.items() if isinstance(v, Tensor)}
        self._store.keep_weights(index, weights)

    def seal(self) -> None:
        """Seal all steps written so far."""
        self._try(self._store.seal)

    def renew(self) -> None:
        """Show other trainings that this one is alive."""
        self._try(self._store.renew)

    def close(self) -> None:
        """Seal all steps, and let other trainings write to the store."""
        self.seal()
        self._store.release()

    def save_fingerprint(self, model: LightningModule) -> None:
        """Store the fingerprint of the trained weights."""
        if self._run_id is not None:
            self._try(lambda: self._store.keep_fingerprint(fingerprint(model)))

    def seal_together(self, trainer: Trainer) -> None:
        """Seal the steps of all processes; all of them must call it."""
        self.seal()
        self.agree(trainer, self.seal)

    def agree(self, trainer: Trainer, close: Callable[[], None]) -> None:
        """Wait for all processes, and stop if one has; all of them must call it."""
        if trainer.world_size == 1:
            return
        has_failed = torch.tensor(int(self.has_failed), device=trainer.strategy.root_device)
        have_any = bool(trainer.strategy.reduce(has_failed, reduce_op="max"))
        if have_any and not self.has_failed:
            close()
            self.has_failed = True
            inform(
                f"{self._owner}: recording has stopped in all processes. The warning of another "
                "one gives the reason."
            )

    def stop(self, reason: str) -> None:
        """Write nothing from now on, and warn of the first reason."""
        if not self.has_failed:  # The run gets no fingerprint, since it is not whole.
            self.has_failed = True
            warnings.warn(f"{self._owner}{self._place}: {reason}", stacklevel=2)

    def state(self) -> dict[str, Any]:
        """Return the state of the run for a checkpoint, in builtins."""
        if self._run_id is None:
            return {}
        return {"run": self._run_id, "steps": self._count, "has_stopped": self.has_failed}

    def load_states(self, states: Iterable[Any]) -> None:
        """Read the states of runs, one of which :meth:`begin` may continue."""
        for state in states:
            if isinstance(state, Mapping) and {"run", "steps"} <= set(state):
                self._states.append(state)

    def _begin_or_continue(self, recipe: Recipe, step: int) -> bool:
        """Return whether the run is continued."""
        self._count = 0
        if self._is_continued(step):
            self._continue(recipe, step)
            return True
        if self._existing == "replace":
            self._store.clear()
        elif step and self._store.run_id is not None:
            raise FileExistsError(
                "The checkpoint belongs to another recorded run than the one in the store, "
                f"{self._store.run_id!r}; expected the store of the checkpoint's run. Name that "
                "store, or record into a new one."
            )
        self._store.begin(recipe)
        if step:
            rank_zero_warn(
                f"{self._owner}: the {step:,} steps before this checkpoint are not in the "
                "store; recording only the steps after it."
            )
        return False

    def _is_continued(self, step: int) -> bool:
        """Return whether the run in the store is one that this training has begun."""
        run_id = self._store.run_id
        begun = self.begun_runs()  # Without a checkpoint, a second `fit` continues its run.
        return step > 0 and run_id is not None and (not begun or run_id in begun)

    def _state_of(self, run_id: str | None) -> dict[str, Any]:
        return next((dict(state) for state in self._states if state["run"] == run_id), {})

    def _continue(self, recipe: Recipe, step: int) -> None:
        if not self._states and self._run_id is None:
            rank_zero_warn(
                f"{self._owner}: the checkpoint does not name a recorded run; continuing the one "
                f"in the store at step {step:,}. Check that it is the run of this training."
            )
        self._store.recipe.require_continued_by(recipe)
        self._store.resume(step)
        self._count = len(self._store)

    def _warn_of_missing_steps(self, trainer: Trainer, expected: int) -> None:
        missing = expected - self._count
        if trainer.world_size > 1:
            # A step that one process has lost is incomplete, whatever the others hold.
            count = torch.tensor(missing, device=trainer.strategy.root_device)
            missing = int(trainer.strategy.reduce(count, reduce_op="max"))
        if missing:
            rank_zero_warn(
                f"{self._owner}: the store lacks {missing:,} steps that were recorded before "
                "this checkpoint; continuing without them."
            )

    def _warn_of_non_finite(self, step: Step) -> None:
        """Name the first sample whose gradient is not finite, in this or another process."""
        if self._has_warned_of_non_finite or not len(bad := step.non_finite_visits()):
            return
        self._has_warned_of_non_finite = True
        warnings.warn(
            f"{self._owner}: the gradient of sample {int(step.sample_ids[bad[0]])} at step "
            f"{step.index} is not finite; expected finite numbers. It is stored as it is. Answers "
            "leave such visits out, or refuse the run from there on if the training diverged. "
            "Look at the sample, or at the loss. Later ones are not named.",
            stacklevel=2,
        )

    def _try(self, write: Callable[[], None]) -> bool:
        """Write, unless writing has failed before; return whether it succeeded.

        Raises:
            ValueError: If the store does not support the request.
        """
        if self.has_failed:
            return False
        try:
            write()
        except ValueError:
            raise
        except Exception as error:  # A store may raise anything; it must not end the training.
            if is_from_signal_handler(error):
                raise
            self.stop(
                f"the store cannot be written any more ({error}). Training goes on; recording has "
                "stopped, and all sealed steps stay readable."
            )
        return not self.has_failed
