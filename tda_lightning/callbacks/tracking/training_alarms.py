"""TrainingAlarms: the Lightning callback that raises alarms about training data, epoch by epoch."""

from __future__ import annotations

import pytorch_lightning as pl

from tda_lightning.callbacks.base_callbacks import RecordedRun
from tda_lightning.callbacks.lightning_trainer import LightningModule, Trainer
from tda_lightning.callbacks.messages import LOGGER
from tda_lightning.results.alarms import Alarms, find_alarms


class TrainingAlarms(pl.Callback):
    """Watch a recorded training: suspicious labels, large contributions, unseen data, wrong order.

    At the end of every epoch, the run so far is read, and the number of samples of each alarm is
    logged: ``alarms/suspected_mislabels``, ``alarms/large_contributions``, ``alarms/never_seen``
    and ``alarms/order_faults``. At the end of training, the logger ``tda_lightning`` warns of the
    alarms, with their ids.

    Args:
        recorder: The `GradientRecorder` or `LossRecorder` of the same training, also among the
            trainer's callbacks.

    Raises:
        ValueError: Before the first batch, if the recorder is not among the callbacks, or if
            several processes train.
    """

    def __init__(self, recorder: RecordedRun) -> None:
        if not isinstance(recorder, RecordedRun):
            raise ValueError(
                f"`recorder` is {recorder!r}; expected the `GradientRecorder` or `LossRecorder` of "
                "the training. "
                "Pass the same object here and in `callbacks=[...]`."
            )
        self.recorder = recorder
        self.alarms = Alarms((), ("anything: no epoch has ended yet",))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check that the training is recorded by one process."""
        if not any(callback is self.recorder for callback in _callbacks(trainer)):
            raise ValueError(
                "The recorder of `TrainingAlarms` is not among the callbacks of this trainer; "
                "expected both. Pass `callbacks=[recorder, TrainingAlarms(recorder)]`."
            )
        if trainer.world_size > 1:
            raise ValueError(
                f"`TrainingAlarms` cannot watch {trainer.world_size} processes; expected one. "
                "Query the run after training: `find_alarms(run)`."
            )

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Read the run so far, and log the number of samples of each alarm."""
        self.recorder.save_steps()
        self.alarms = find_alarms(self.recorder.store)
        curves = {f"alarms/{name}": float(n) for name, n in self.alarms.counts().items()}
        for logger in trainer.loggers:
            logger.log_metrics(curves, step=trainer.global_step)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log a warning with the alarms and the ids of their samples."""
        if self.alarms.raised:
            LOGGER.warning("TrainingAlarms: %r", self.alarms)


def _callbacks(trainer: Trainer) -> list[object]:
    callbacks: list[object] = vars(trainer)["callbacks"]  # Lightning declares no type for it.
    return callbacks
