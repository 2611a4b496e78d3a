"""RecordedRun: the part of the recorder that ties checkpoints and weights to its run."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl

from tda_lightning.callbacks.lightning_types import LightningModule, Trainer
from tda_lightning.callbacks.run_location import RunLocation
from tda_lightning.callbacks.run_writer import RunWriter
from tda_lightning.recording.training_recorder import TrainingRecorder


class RecordedRun(pl.Callback):
    """Reads the states of runs from checkpoints, and shows that a run is being written."""

    _writer: RunWriter
    _location: RunLocation
    _recorder: TrainingRecorder | None

    def __repr__(self) -> str:
        """Show where the run goes."""
        path = getattr(getattr(self, "store", None), "path", None)
        return f"{type(self).__name__}({str(path)!r})" if path else f"{type(self).__name__}()"

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check that no other recorder of the trainer has the same store."""
        super().setup(trainer, pl_module, stage)
        callbacks = getattr(trainer, "callbacks", [])
        others = [each for each in callbacks if isinstance(each, RecordedRun)]
        if any(each is not self and each._location.is_same_as(self._location) for each in others):
            raise ValueError(
                f"Two `{type(self).__name__}` of one trainer record into the same store, "
                f"`{self._location.name}`; expected a store for each. Give each another path, or "
                "remove one of them from `callbacks`."
            )

    @property
    def state_key(self) -> str:
        """Name of this recorder in a checkpoint: that of its run, wherever its store is."""
        run = self._writer.run_id
        if run is not None:
            return self._generate_state_key(run=run)
        return self._generate_state_key(store=self._location.name)

    # Not `state_dict`: Lightning then refuses two recorders of a store in words of its own.
    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Add the state of the run to a checkpoint; seal all steps that its weights include."""
        recorder = {}
        if self._recorder is not None:
            self._recorder.finish_steps()
            recorder = {"lanes": self._recorder.state()}
        if state := self._writer.state():
            checkpoint.setdefault("callbacks", {})[self.state_key] = {**state, **recorder}
        if self._recorder is not None:
            self._writer.seal_together(trainer)

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
