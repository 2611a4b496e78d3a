"""An error after the first steps ends the recording and not the training, in all its processes.

A process that has stopped may not leave the others waiting. After the first steps, recorders
exchange something only

- in checkpoints and at the end, where the callbacks of all processes take part, stopped or not;
- before the step of an optimizer that is young again: there, all processes agree first;
- in audits, and in the first step of each optimizer: while they lie ahead, errors are raised.

The other processes stop at the next of these exchanges. Until then they record parts of steps that
are left out, since the part of one process is missing.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from tda_lightning.callbacks.base_callbacks import RecordedRun, RecordingCallback
from tda_lightning.callbacks.checks import is_from_signal_handler
from tda_lightning.callbacks.lightning_trainer import LightningModule, Trainer
from tda_lightning.recording.preconditioning import is_young
from tda_lightning.recording.training_recorder import TrainingRecorder

# An error of the recorder ends the training within so many steps; later, hours would be lost.
_STEPS_WITH_ERRORS = 20


class StoppingRecorder(RecordedRun, RecordingCallback):
    """A recorder without which a training goes on, once it has begun well."""

    audit = 0
    _is_training = False

    def _attach(self, trainer: Trainer, recorder: TrainingRecorder, every_n_steps: int) -> None:
        super()._attach(trainer, recorder, every_n_steps)
        self._is_training = True

    def on_before_backward(
        self, trainer: Trainer, pl_module: LightningModule, loss: Tensor
    ) -> None:
        """Prepare for the backward pass of the loss."""
        is_late = self._is_late(trainer)
        if trainer.world_size > 1 and is_late and any(map(is_young, trainer.optimizers)):
            self._writer.agree(trainer, self._close)
        super().on_before_backward(trainer, pl_module, loss)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Discard the rows of a batch that led to no step; stop if the store has failed."""
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        if self._writer.has_failed and not self._is_awaited(trainer):
            self._close()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Seal the run and remove everything that was installed."""
        self._is_training = False
        super().on_train_end(trainer, pl_module)
        self._writer.finish(trainer)

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Save and clean up if training fails or is interrupted."""
        self._is_training = False
        super().on_exception(trainer, pl_module, exception)

    @contextmanager
    def _sparing(self, trainer: Trainer) -> Iterator[None]:
        """Turn an error that comes late into a warning, and close the run."""
        try:
            yield
        except Exception as error:
            is_early = not self._is_late(trainer)
            if is_early or self._is_awaited(trainer) or is_from_signal_handler(error):
                raise
            self._close()
            self._writer.stop(
                f"recording has stopped at step {trainer.global_step:,}: {error} Training goes "
                "on, and the steps before stay readable."
            )

    def _is_late(self, trainer: Trainer) -> bool:
        return trainer.global_step - self._writer.first_step >= _STEPS_WITH_ERRORS

    def _is_awaited(self, trainer: Trainer) -> bool:
        """Return whether other processes would wait for this recorder if it stopped."""
        if trainer.world_size == 1:
            return False
        recorders = [] if self._recorder is None else self._recorder.recorders
        is_busy = any(recorder.has_exchanges_ahead() for recorder in recorders)
        return self.audit > 0 or is_busy or not self._is_late(trainer)

    def _finish_steps(self) -> dict[str, Any] | None:
        if self._recorder is None:  # It may have stopped alone; other processes seal with this one.
            return {} if self._is_training else None
        self._recorder.finish_steps()
        return {"lanes": self._recorder.state()}
