"""RecordedRun: the part of the recorder that ties checkpoints and weights to its run."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl

from tda_lightning.callbacks.lightning_types import LightningModule, Trainer
from tda_lightning.callbacks.run_writer import RunWriter


class RecordedRun(pl.Callback):
    """Reads the states of runs from checkpoints, and shows that a run is being written."""

    _writer: RunWriter

    def __repr__(self) -> str:
        """Show where the run goes."""
        path = getattr(getattr(self, "store", None), "path", None)
        return f"{type(self).__name__}({str(path)!r})" if path else f"{type(self).__name__}()"

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
