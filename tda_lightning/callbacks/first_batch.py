"""The first batch: what it took, and how much of that was recording, said before its step."""

from __future__ import annotations

from pytorch_lightning.utilities import rank_zero_info
from torch import Tensor

from tda_lightning.callbacks.lightning_types import LightningModule
from tda_lightning.recording.timing import BatchTiming, Stopwatch
from tda_lightning.recording.training_recorder import TrainingRecorder


class FirstBatch:
    """Takes the time of a training's first recorded batch, as it is: nothing is done for it.

    The forward and the backward pass are measured. Recording is what happens before the backward
    pass on its account, and the rows that are made on the way.
    """

    def __init__(self) -> None:
        self._watch: Stopwatch | None = None
        self._ahead = 0.0
        self._is_over = False

    def start(self, model: LightningModule, recorder: TrainingRecorder) -> None:
        """Expect the forward pass of a batch."""
        is_first = not self._is_over and model.automatic_optimization and recorder.is_recording()
        self._watch = Stopwatch(model.device) if is_first else None

    def start_backward(self, recorder: TrainingRecorder, loss: Tensor, loss_scale: float) -> None:
        """Let the lanes expect the backward pass of the batch's loss."""
        if self._watch is None:
            recorder.start_backward(loss, loss_scale)
            return
        begun = self._watch.seconds()
        recorder.start_backward(loss, loss_scale)
        self._ahead = self._watch.seconds() - begun
        recorder.take_time(self._watch.seconds)

    def end_backward(self, recorder: TrainingRecorder) -> None:
        """Say what the batch took."""
        if self._watch is None:
            return
        recording = self._ahead + recorder.time_taken()
        pace = BatchTiming(max(self._watch.seconds() - recording, 1e-9), recording)
        self._watch, self._is_over = None, True
        rank_zero_info(f"GradientRecorder: {pace.describe()}, to go by the first, the slowest.")
