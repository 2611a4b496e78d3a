"""OptimizerRecorder: record the steps of one optimizer with the layers that it trains."""

from __future__ import annotations

from functools import partial

from torch.optim import Optimizer

from tda_lightning.gradients.parameter_selection import ParameterSelection
from tda_lightning.recording.manual_step_builder import ManualStepBuilder
from tda_lightning.recording.optimizers import parameters_of
from tda_lightning.recording.preconditioning import JointPreconditioner, PartialPreconditioner
from tda_lightning.recording.settings import RecordingSettings
from tda_lightning.recording.step_builder import StepBuilder

# Clipping by value that leaves a gradient's cosine above this counts as scaling.
_MIN_COSINE = 0.99


class OptimizerRecorder:
    """Records the steps of one optimizer.

    Args:
        optimizer: The optimizer.
        selection: All recorded layers, with the sources that this optimizer trains.
        settings: Settings that all optimizers share.
        joint: Holds the preconditioners of all optimizers together.

    Attributes:
        steps_taken: Number of steps that the optimizer has taken.
        every_n_steps: Record every n-th of them.
        rows: Records the rows of a batch.
        builder: Builds the steps.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        selection: ParameterSelection,
        settings: RecordingSettings,
        joint: JointPreconditioner,
    ) -> None:
        self.optimizer = optimizer
        self.steps_taken = 0
        self.every_n_steps = 1
        self._warn = settings.warn
        self._labels = settings.labels
        self._n_trained = self._count_trained()
        self._has_warned_of_clipping = False
        preconditioner = None
        if settings.preconditioner == "optimizer":
            preconditioner = PartialPreconditioner(optimizer, selection, joint)
        is_manual = settings.optimization == "manual"
        self.rows = settings.rows(selection)
        builder = partial(ManualStepBuilder, optimizer, self.is_due) if is_manual else StepBuilder
        self.builder = builder(self.rows, selection, preconditioner, settings, self._label_weight)

    def is_due(self) -> bool:
        """Return whether the next step is to be recorded."""
        return self.steps_taken % self.every_n_steps == 0

    def _label_weight(self) -> float:
        return self._labels.weight(self.steps_taken // self.every_n_steps)

    def warn_of_unrecorded_parameters(self) -> None:
        """Warn once if more parameters are trained now than when recording began."""
        before, self._n_trained = self._n_trained, self._count_trained()
        if self._n_trained > before:
            self._warn(
                f"GradientRecorder: {self._n_trained - before} parameters of the "
                f"{type(self.optimizer).__name__} are not recorded, since they were not trained "
                "when recording began."
            )

    def before_clipping(self, index: int, bound: float) -> None:
        """Account for clipping by value, and warn once if it changes a gradient's direction."""
        clipping = self.builder.before_clipping(self.optimizer, bound)
        # The cosine is NaN if gradients have overflowed; such a step will be skipped.
        if clipping is None or not clipping.cosine < _MIN_COSINE or self._has_warned_of_clipping:
            return
        self._has_warned_of_clipping = True
        self._warn(
            "tda_lightning: clipping by value has changed the direction of the gradient of the "
            f"{type(self.optimizer).__name__} in step {index:,} (cosine {clipping.cosine:.2f}). No "
            "single factor for all samples reproduces that. The rows of such steps are the rows "
            f"before clipping, times the nearest factor (here {clipping.factor:.2g}). For exact "
            "rows, set `gradient_clip_algorithm='norm'`."
        )

    def _count_trained(self) -> int:
        return sum(parameter.requires_grad for parameter in parameters_of(self.optimizer))
