"""OptimizerRecorder: record the steps of one optimizer with the layers that it trains."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch.optim import Optimizer

from tda_lightning.gradients.parameter_selection import ParameterSelection
from tda_lightning.recording.manual_step_builder import ManualStepBuilder
from tda_lightning.recording.optimizer_gradients import first_with_gradient, parameters_of
from tda_lightning.recording.preconditioning import (
    JointPreconditioner,
    OptimizerPreconditioner,
    is_young,
)
from tda_lightning.recording.settings import RecordingSettings
from tda_lightning.recording.step_builder import StepBuilder
from tda_lightning.recording.taken_step import TakenStep

# Clipping by value that leaves a gradient's cosine above this counts as scaling.
_MIN_COSINE = 0.99


class OptimizerRecorder:
    """Records the steps of one optimizer.

    Args:
        optimizer: The optimizer.
        selection: All recorded blocks, with the parameters that this optimizer trains.
        settings: Settings that all optimizers share.
        joint: Holds the preconditioners of all optimizers together.

    Attributes:
        is_announced: Whether the trainer has announced the next step.
        depth: Number of steps within each other: a derived optimizer may call `super().step()`.
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
        self.is_announced = False
        self.depth = 0
        self.every_n_steps = 1
        self._warn = settings.warn
        self._note_unfrozen = settings.note_unfrozen
        self._labels = settings.labels
        # The recorder keeps the parameters alive, so no other object can get their ids.
        self._trained = self._trained_ids()
        self._known = set(self._trained)
        self._has_warned_of_clipping = self._has_warned_of_lost_step = False
        self._has_warned_of_other_gradients = self._has_warned_of_scaling = False
        preconditioner = None
        if settings.preconditioner == "optimizer":
            preconditioner = OptimizerPreconditioner(optimizer, selection, joint)
        is_manual = settings.optimization == "manual"
        self.rows = settings.rows(selection)
        builder = partial(ManualStepBuilder, optimizer, self.is_due) if is_manual else StepBuilder
        self.builder = builder(self.rows, selection, preconditioner, settings, self._label_weight)

    def is_due(self) -> bool:
        """Return whether the next step is to be recorded."""
        return self.steps_taken % self.every_n_steps == 0

    def has_exchanges_ahead(self) -> bool:
        """Return whether several processes will exchange something, but for audits on request.

        They do so in the first recorded step, and while coordinates follow from its gradient.
        """
        return self.builder.n_recorded_steps == 0 or is_young(self.optimizer)

    def _label_weight(self) -> float:
        schedule = self._labels
        return 1.0 if schedule is None else schedule.weight(self.steps_taken // self.every_n_steps)

    def warn_of_unrecorded_parameters(self) -> None:
        """Warn once of each parameter that was not trained when recording began."""
        trained = self._trained_ids()
        if trained == self._trained:
            return
        self.builder.forget_parameters()
        self._trained, new = trained, set(trained) - self._known
        self._known |= new
        if new:
            self._note_unfrozen([p for p in parameters_of(self.optimizer) if id(p) in new])
            self._warn(
                f"GradientRecorder: {len(new)} parameters of the {type(self.optimizer).__name__} "
                "are not recorded, since they were not trained when recording began."
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

    def check_scaling(self, taken: TakenStep) -> None:
        """Warn once if the gradients of a step were not all scaled by one factor, if known."""
        scaling = taken.scaling
        if scaling is None or scaling.is_common:
            return
        self.builder.has_several_factors = True
        if self._has_warned_of_scaling:
            return
        self._has_warned_of_scaling = True
        self._warn(
            f"GradientRecorder: the gradients of the {type(self.optimizer).__name__} were changed "
            f"between the backward pass and step {taken.index:,}, and not all by one factor: some "
            f"are {scaling.smallest:.2g} and others {scaling.largest:.2g} times as large. The rows "
            "of such steps are the rows before the change, times a mean of these factors (here "
            f"{scaling.factor:.2g}). For exact rows, clip the gradients of all parameters "
            "together, freeze layers by `requires_grad_(False)`, and add no noise."
        )

    def before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> Any:
        """Have the gradients measured right before they are used: a hook of the optimizer.

        It runs before the closure, in which the backward pass is, so it wraps the closure.
        """
        self.depth += 1
        if self.depth > 1:
            return None
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if closure is None:
            self.builder.before_update()
            return None

        def measured() -> Any:
            result = closure()
            self.builder.before_update()
            return result

        if "closure" in kwargs:
            return args, {**kwargs, "closure": measured}
        return (args[0], measured, *args[2:]), kwargs

    def warn_of_lost_step(self) -> None:
        """Discard the rows of a step that was not announced; warn once."""
        self.builder.drop_batch()
        self.builder.forget_gradients()
        if self._has_warned_of_lost_step:
            return
        self._has_warned_of_lost_step = True
        self._warn(
            f"GradientRecorder: the {type(self.optimizer).__name__} took a step without "
            "`on_before_optimizer_step`; expected Lightning to call that hook before every step. "
            "Such steps are not recorded. Call `optimizer.step(closure)` with the closure in "
            "`optimizer_step`, and do not fit the model with a second trainer meanwhile."
        )

    def warn_of_other_gradients(self) -> None:
        """Warn once of a step with gradients that no backward pass of its batch has led to."""
        if not self.is_due() or self._has_warned_of_other_gradients:
            return
        if first_with_gradient(parameters_of(self.optimizer)) is None:
            return  # The step of a batch without a loss changes nothing.
        self._has_warned_of_other_gradients = True
        self._warn(
            f"GradientRecorder: the {type(self.optimizer).__name__} took a step without a backward "
            "pass by Lightning, so its gradients belong to no sample; expected `training_step` to "
            "return the loss, or manual optimization with `self.manual_backward(loss)`. Such steps "
            "are not recorded. Losses of copies of the model, as in meta-learning, cannot be."
        )

    def _trained_ids(self) -> list[int]:
        return [id(p) for p in parameters_of(self.optimizer) if p.requires_grad]
