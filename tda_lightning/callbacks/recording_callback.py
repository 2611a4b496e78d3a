"""RecordingCallback: the part of a callback that attaches a recorder to a training and removes it.

`GradientRecorder` and `ContributionTracker` are built on it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytorch_lightning as pl
from torch import Tensor
from torch.optim import Optimizer

from tda_lightning.callbacks.lightning_trainer import (
    LightningModule,
    Trainer,
    loss_scale_of,
    watch_clipping,
    watch_loaders,
)
from tda_lightning.recording.sample_ids import IdSource, SampleLedger
from tda_lightning.recording.training_recorder import TrainingRecorder


class RecordingCallback(pl.Callback):
    """Passes Lightning's events on to a recorder, from the first batch to the last.

    A subclass creates the recorder in ``on_train_start`` and calls :meth:`_attach`.
    """

    def __init__(self, sample_ids: IdSource | None) -> None:
        self.sample_ids = sample_ids
        self._ledger = SampleLedger(sample_ids)
        self._recorder: TrainingRecorder | None = None  # Only while it is attached.
        self._undo: list[Callable[[], None]] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Watch the sampler of the training loader."""
        if stage == "fit":
            stop = watch_loaders(trainer, lambda loader: self._watch(trainer, loader))
            self._undo = [stop, self._ledger.release]

    def _watch(self, trainer: Trainer, loader: object) -> None:
        """Infer sample ids from a training loader."""
        self._ledger.watch(loader, lambda: trainer.training)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Expect the first batch of a new pass over the data."""
        self._ledger.start_epoch()

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Determine the sample ids of the batch; record its forward pass if its step is due."""
        if self._recorder is not None:
            sample_ids = self._ledger.name(batch, batch_idx)
            share = 1 / trainer.accumulate_grad_batches
            self._recorder.start_batch(trainer.global_step, sample_ids, share)

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
            self._recorder.start_backward(loss, loss_scale_of(trainer))

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Collect the rows of the batch."""
        if self._recorder is not None:
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
        if self._recorder is not None:
            recorder, self._recorder = self._recorder, None
            recorder.detach()
            self._save()

    def _save(self) -> None:
        """Make everything recorded so far safe."""
        raise NotImplementedError
