"""The two parts that callbacks are built of.

A :class:`RecordingCallback` attaches a recorder to a training and removes it, as `GradientRecorder`
and `ContributionTracker` do. A :class:`RecordedRun` chooses a store, and continues a run from a
checkpoint, as `GradientRecorder` and `LossRecorder` do.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from torch import Tensor
from torch.optim import Optimizer

from tda_lightning.callbacks.drawn_samples import DrawnSamples
from tda_lightning.callbacks.lightning_trainer import (
    LightningModule,
    Trainer,
    loss_scale_of,
    sampler_pass,
    training_loaders,
    watch_clipping,
    watch_loaders,
    watch_transfers,
)
from tda_lightning.callbacks.run_location import Existing, RunLocation
from tda_lightning.callbacks.run_writer import RunWriter
from tda_lightning.callbacks.training_ids import warn_of_other_loaders
from tda_lightning.recording.sample_ids import IdSource, SampleLedger
from tda_lightning.recording.training_recorder import TrainingRecorder
from tda_lightning.stores import WritableStore


class RecordingCallback(pl.Callback):
    """Passes Lightning's events on to a recorder, from the first batch to the last.

    A subclass creates the recorder in ``on_train_start`` and calls :meth:`_attach`.
    """

    def __init__(self, sample_ids: IdSource | None) -> None:
        self.sample_ids = sample_ids
        self._ledger = SampleLedger(sample_ids)
        self._drawn_samples = DrawnSamples(type(self).__name__)
        self._recorder: TrainingRecorder | None = None  # Only while it is attached.
        self._undo: list[Callable[[], None]] = []
        self._has_begun = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Watch the sampler of the training loader."""
        if stage == "fit":
            self._has_begun = False
            stop = watch_loaders(trainer, lambda loader: self._watch(trainer, loader))
            transfers = watch_transfers(trainer, self._drawn_samples.transferring)
            self._undo = [stop, transfers, self._ledger.release]

    def _watch(self, trainer: Trainer, loader: object) -> None:
        """Infer sample ids from a training loader."""
        with self._sparing(trainer) if self._has_begun else nullcontext():
            self._ledger.watch(loader, lambda: trainer.training)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Expect the first batch of a new pass over the data."""
        if self._has_begun:
            self._watch_again(trainer)
        self._has_begun = True
        self._ledger.start_epoch()

    def _watch_again(self, trainer: Trainer) -> None:
        """Watch the loader of this epoch, if the model has put another one in its place.

        The first epoch still has the loader that the trainer has prepared.
        """
        loaders = training_loaders(trainer)
        if len(loaders) == 1 and not self._ledger.is_watching(loaders[0]):
            self._watch(trainer, loaders[0])

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Determine the sample ids of the batch; record its forward pass if its step is due."""
        if self._recorder is not None:
            with self._sparing(trainer):
                self._start_batch(self._recorder, trainer, batch, batch_idx)

    def _start_batch(
        self, recorder: TrainingRecorder, trainer: Trainer, batch: Any, batch_idx: int
    ) -> None:
        sample_ids = self._ledger.name(batch, batch_idx, sampler_pass(trainer))
        if batch_idx == trainer.global_step == 0:
            warn_of_other_loaders(type(self).__name__, trainer, batch, len(sample_ids))
        share = 1 / trainer.accumulate_grad_batches
        recorder.start_batch(trainer.global_step, sample_ids, share)
        if len(sample_ids) > 1 and recorder.is_recording():
            self._drawn_samples.start(batch, len(sample_ids), recorder.rows.is_compiled)

    def on_before_zero_grad(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        """Discard the rows of unused gradients: a model may decline to take a step."""
        if self._recorder is not None:
            self._recorder.forget_gradients()

    def on_before_backward(
        self, trainer: Trainer, pl_module: LightningModule, loss: Tensor
    ) -> None:
        """Prepare for the backward pass of the loss."""
        if self._recorder is not None:
            with self._sparing(trainer):
                self._start_backward(self._recorder, trainer, pl_module, loss)

    def _start_backward(
        self, recorder: TrainingRecorder, trainer: Trainer, model: LightningModule, loss: Tensor
    ) -> None:
        self._show_rows(recorder)
        recorder.start_backward(loss, loss_scale_of(trainer))
        self._correct_order(recorder, loss)

    def _sparing(self, trainer: Trainer) -> AbstractContextManager[None]:
        """Return what decides whether an error ends the training: here, it does."""
        return nullcontext()

    def _show_rows(self, recorder: TrainingRecorder) -> None:
        """Let the recorder know whose rows the batch has, now that its forward pass is over."""
        self._drawn_samples.stop()
        recorder.know(self._drawn_samples.known_rows(recorder.batch_size))

    def _correct_order(self, recorder: TrainingRecorder, loss: Tensor) -> None:
        """Give rows the ids of the samples that they hold, if the step has drawn them again."""
        order = self._drawn_samples.order(loss, recorder.rows_of)
        if order is not None:
            recorder.reorder(order)

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Collect the rows of the batch."""
        if self._recorder is not None:
            with self._sparing(trainer):
                self._recorder.end_backward()

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        """Read the learning rate now: its scheduler will have stepped at the end of the batch."""
        if self._recorder is not None:
            self._recorder.before_step(trainer.global_step, trainer.current_epoch, optimizer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Discard the rows of a batch that led to no step."""
        if self._recorder is not None:
            self._drawn_samples.stop()
            self._recorder.end_batch()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save, and remove everything that was installed."""
        self._close()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Save and clean up if training fails or is interrupted."""
        self._close()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Clean up if training never began."""
        self._close()

    def _attach(self, trainer: Trainer, recorder: TrainingRecorder, every_n_steps: int) -> None:
        """Attach a recorder until :meth:`_close`."""
        recorder.attach(every_n_steps)
        self._undo.append(watch_clipping(trainer, recorder.before_clipping))
        self._recorder = recorder

    def _close(self) -> None:
        undo, self._undo = self._undo, []
        for action in undo:
            action()
        self._drawn_samples.close()
        if self._recorder is not None:
            recorder, self._recorder = self._recorder, None
            recorder.detach()
            self._save()

    def _save(self) -> None:
        """Make everything recorded so far safe."""
        raise NotImplementedError


class RecordedRun(pl.Callback):
    """Reads the states of runs from checkpoints, and shows that a run is being written.

    Args:
        store: Folder to record into, a store, or ``None`` for the trainer's log folder.
        existing: What to do with a run in the store that the training does not continue.
    """

    _name: str  # in messages
    _gives_way = False  # Whether it stops where another recorder is in the trainer.

    def __init__(self, store: str | Path | WritableStore | None, existing: Existing | None) -> None:
        self._location = RunLocation(store, existing)
        self.store = self._location.initial
        self.existing = self._location.existing
        permits = self.existing == "replace"
        self._writer = RunWriter(self.store, "replace" if permits else "refuse", self._name)

    def __repr__(self) -> str:
        """Show where the run goes."""
        path = getattr(getattr(self, "store", None), "path", None)
        return f"{type(self).__name__}({str(path)!r})" if path else f"{type(self).__name__}()"

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check that no other recorder of the trainer has the same store."""
        super().setup(trainer, pl_module, stage)
        callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
        recorders = [each for each in callbacks if isinstance(each, RecordedRun)]
        others = [each for each in recorders if each is not self and not each._gives_way]
        same = [each for each in others if each._location.is_same_as(self._location)]
        if same:
            first, second = sorted((self._name, same[0]._name))
            both = f"Two `{first}`" if first == second else f"A `{first}` and a `{second}`"
            raise ValueError(
                f"{both} of one trainer record into the same store, `{self._location.name}`; "
                "expected a store for each. Give each another path, or remove one of them from "
                "`callbacks`."
            )

    @property
    def state_key(self) -> str:
        """Name of this recorder in a checkpoint: that of its run, wherever its store is."""
        run = self._writer.run_id
        if run is not None:
            return self._generate_state_key(run=run)
        return self._generate_state_key(store=self._location.name)

    # Not `state_dict`: Lightning would refuse two recorders of a store, with an unclear message.
    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Add the state of the run to a checkpoint; seal all steps that its weights include."""
        recorder = self._finish_steps()
        if recorder is not None:
            self._writer.seal_together(trainer)
        if state := self._writer.state():
            checkpoint.setdefault("callbacks", {})[self.state_key] = {**state, **(recorder or {})}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Read the state of a run, which is continued when training starts."""
        self._writer.load_states([state_dict])

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Read the states of all runs in the checkpoint; the one in the store is continued."""
        self._writer.load_states(checkpoint.get("callbacks", {}).values())

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Store the fingerprint of the weights, to compare with those of later queries."""
        if trainer.is_global_zero:
            self._writer.save_fingerprint(pl_module)

    def on_validation_batch_end(self, trainer: Trainer, *_: Any) -> None:
        """Show other trainings that this one is alive."""
        self._writer.renew()

    def save_steps(self) -> None:
        """Write all steps that were taken, so that the run so far can be read."""
        self._finish_steps()
        self._writer.seal()

    def _choose_store(self, trainer: Trainer) -> None:
        """Record into the store of this training; all processes must call it."""
        store = self._location.choose(trainer, self._writer.begun_runs())
        path, other = getattr(self.store, "path", None), getattr(store, "path", None)
        # A store at the same path as before stays in use.
        if store is not self.store and (path is None or path != other):
            self.store = store
            self._writer.move_to(store)

    def _finish_steps(self) -> dict[str, Any] | None:
        """Write all steps that were taken.

        Returns:
            What a checkpoint needs beside the state of the run; ``None`` while nothing is recorded.
        """
        raise NotImplementedError
