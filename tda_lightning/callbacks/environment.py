"""Recording without a line of code: an environment variable names the store.

Lightning calls this entry point when it creates a Trainer, wherever tda_lightning is installed.
Nothing is recorded unless the variable is set. The script does not mention the recorder, so nothing
that goes wrong with it ends the training.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

from pytorch_lightning.utilities import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer

from tda_lightning.callbacks.base_callbacks import RecordedRun
from tda_lightning.callbacks.gradient_recorder import GradientRecorder
from tda_lightning.callbacks.lightning_trainer import LightningModule, Trainer
from tda_lightning.callbacks.messages import inform
from tda_lightning.callbacks.run_location import Existing
from tda_lightning.stores.arguments import require_choice

VARIABLE = "TDA_LIGHTNING_STORE"
EXISTING = "TDA_LIGHTNING_EXISTING"


def recorders_from_environment() -> list[GradientRecorder]:
    """Return a recorder into ``$TDA_LIGHTNING_STORE``, or none if it is unset.

    ``$TDA_LIGHTNING_EXISTING`` is the argument ``existing``; by default, runs are numbered.

    Raises:
        ValueError: If the second variable is none of "refuse", "replace" and "number".
    """
    path, existing = os.environ.get(VARIABLE), os.environ.get(EXISTING, "number")
    if not path:
        return []
    require_choice(EXISTING, existing, Existing)
    return [EnvironmentRecorder(path, existing=cast(Existing, existing))]


class EnvironmentRecorder(GradientRecorder):
    """A recorder that gives way to one in the script, and whose errors do not end the training."""

    _is_off = False
    _gives_way = True

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Stop if the script has a recorder; otherwise watch the training loader."""
        callbacks = getattr(trainer, "callbacks", [])
        recorders = [c for c in callbacks if isinstance(c, RecordedRun) and not c._gives_way]
        self._is_off = any(
            isinstance(c, GradientRecorder) or self._location.is_same_as(c._location)
            for c in recorders
        )
        if self._is_off and stage == "fit":
            inform(f"GradientRecorder: the script records by itself; `{VARIABLE}` has no effect.")
        if not self._is_off:
            super().setup(trainer, pl_module, stage)

    def _watch(self, trainer: Trainer, loader: object) -> None:
        """Infer sample ids from a training loader."""
        with self._kept_going():
            if not self._is_off:
                super()._watch(trainer, loader)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin the run."""
        with self._kept_going():
            if not self._is_off:
                super().on_train_start(trainer, pl_module)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Determine the sample ids of the batch."""
        with self._kept_going():
            super().on_train_batch_start(trainer, pl_module, batch, batch_idx)

    def on_before_backward(
        self, trainer: Trainer, pl_module: LightningModule, loss: Tensor
    ) -> None:
        """Prepare for the backward pass of the loss."""
        with self._kept_going():
            super().on_before_backward(trainer, pl_module, loss)

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Collect the rows of the batch."""
        with self._kept_going():
            super().on_after_backward(trainer, pl_module)

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        """Check the rows of the first step."""
        with self._kept_going():
            super().on_before_optimizer_step(trainer, pl_module, optimizer)

    @contextmanager
    def _kept_going(self) -> Iterator[None]:
        """Turn an error into a warning, and stop recording."""
        try:
            yield
        except Exception as error:  # Whatever it is, it must not end the training.
            self._is_off = True
            self._close()
            self._writer.has_failed = True  # A run that is not whole gets no fingerprint.
            rank_zero_warn(f"GradientRecorder: recording has stopped: {error} Training goes on.")
