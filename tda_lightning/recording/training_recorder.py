"""TrainingRecorder: pass the events of a training on to the recorder of each optimizer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from jaxtyping import Int
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from tda_lightning.gradients.graph.sample_layout import IrregularRows, KnownRows, SampleLayout
from tda_lightning.gradients.graph.walk import Node
from tda_lightning.gradients.losses import Reduction, reduction_of
from tda_lightning.gradients.parameter_selection import ParameterSelection
from tda_lightning.gradients.row_recorder import RowRecorder
from tda_lightning.gradients.sketching.projectors import Projector
from tda_lightning.recording.optimizer_recorder import OptimizerRecorder
from tda_lightning.recording.preconditioning import JointPreconditioner
from tda_lightning.recording.settings import RecordingSettings
from tda_lightning.recording.taken_step import StepsTogether, TakenStep
from tda_lightning.recording.trained_layers import split_by_optimizer
from tda_lightning.recording.unseen_steps import UnseenSteps
from tda_lightning.stores.step import Preconditioner, Step


class TrainingRecorder:
    """Records the steps of all optimizers of a training.

    The order of events is :meth:`start_batch`, :meth:`start_backward`, :meth:`end_backward`,
    :meth:`before_step`, :meth:`end_batch`.

    Args:
        optimizers: All optimizers.
        selection: The recorded layers.
        projector: Sketches their gradients.
        settings: Settings that all optimizers share.
        keep: Called with every recorded step, after the optimizer has taken it.

    Attributes:
        batch_size: Number of samples of the current batch.
        may_wait: Whether steps may wait for later ones, to be kept together.
        recorders: Those of the optimizers with recorded layers.
    """

    may_wait = True

    def __init__(
        self,
        optimizers: Sequence[Optimizer],
        selection: ParameterSelection,
        projector: Projector,
        settings: RecordingSettings,
        keep: Callable[[Step], None],
    ) -> None:
        self.selection = selection
        self.projector = projector
        self.settings = settings
        self._keep = keep
        self._joint_preconditioner = JointPreconditioner(selection.blocks)
        parts = [
            replace(selection, parameters=part)
            for part in split_by_optimizer(selection, optimizers)
        ]
        self.recorders = [
            OptimizerRecorder(optimizer, part, settings, self._joint_preconditioner)
            for optimizer, part in zip(optimizers, parts, strict=True)
            if any(part.parameters)
        ]
        self._steps = StepsTogether()
        self._n_optimizers = len(optimizers)
        self._unseen_steps = UnseenSteps(optimizers, settings.warn)
        self._hooks: list[Any] = []
        self._backward_passes = self.batch_size = 0
        self._has_checked_rows = False

    @property
    def rows(self) -> RowRecorder:
        """The row recorder of the first optimizer."""
        return self.recorders[0].rows

    def attach(self, every_n_steps: int) -> None:
        """Attach all hooks, to record every n-th step of each optimizer."""
        for recorder in self.recorders:
            recorder.every_n_steps = every_n_steps
            recorder.rows.__enter__()
            optimizer = recorder.optimizer
            self._hooks += [
                optimizer.register_step_pre_hook(recorder.before_step),
                optimizer.register_step_post_hook(self._after_step(recorder)),
            ]

    def detach(self) -> None:
        """Remove all hooks."""
        self._unseen_steps.end()
        for recorder in self.recorders:
            recorder.rows.__exit__()
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        try:
            self.finish_steps()
        except RuntimeError as error:  # A device has failed, say, which ends the training.
            self.settings.warn(f"GradientRecorder: the last steps are not recorded: {error}")

    def is_recording(self) -> bool:
        """Return whether the next step of some optimizer is to be recorded."""
        return any(recorder.is_due() for recorder in self.recorders)

    def extra_backward(
        self, loss: Tensor, trained: Sequence[Parameter], label_weight: float
    ) -> None:
        """Run the recorded backward pass of a loss without any effect, to measure its time."""
        for recorder in self.recorders:
            recorder.rows.extra_backward(loss, trained, label_weight)

    def take_time(self, clock: Callable[[], float]) -> None:
        """Measure the time spent on rows with a clock, until :meth:`time_taken`."""
        for recorder in self.recorders:
            recorder.rows.take_time(clock)

    def time_taken(self) -> float:
        """Stop measuring, and return the seconds spent on rows."""
        total = sum(recorder.rows.seconds for recorder in self.recorders)
        for recorder in self.recorders:
            recorder.rows.take_time(None)
        return total

    def record_every(self, every_n_steps: int) -> None:
        """Change the stride during a batch; its step is dropped unless the new stride hits it."""
        for recorder in self.recorders:
            recorder.every_n_steps = every_n_steps
            if not recorder.is_due():
                recorder.builder.drop_batch()

    def reduction_of(self, loss: Tensor, share: float) -> Reduction | None:
        """Return how the loss of the batch combines its samples, if its graph shows that.

        Under accumulation, the loss is a ``share`` of the step's loss.
        """
        is_divided = self.settings.optimization == "automatic"  # By Lightning: it may accumulate.
        with self.rows.paused():
            return reduction_of(loss, self.batch_size, share, quotients=int(is_divided))

    def use_reduction(self, reduction: Reduction) -> None:
        """Change how losses are taken to combine their samples, from the current batch on."""
        for recorder in self.recorders:
            recorder.builder.reduction = reduction

    def start_batch(self, index: int, sample_ids: Int[Tensor, " n"], share: float) -> None:
        """Prepare for the forward pass of a batch, where one of its steps is to be recorded."""
        self._backward_passes, self.batch_size = 0, len(sample_ids)
        if len(sample_ids) == 0:  # It contributes nothing, and has no sample axis to find.
            return
        for recorder in self.recorders:
            recorder.depth = 0  # A step that failed has not ended.
            if self.settings.optimization == "manual" or recorder.is_due():
                recorder.builder.start_batch(index, sample_ids, share)

    def forget_gradients(self) -> None:
        """Discard the rows of gradients that are about to be zeroed."""
        for recorder in self.recorders:
            recorder.builder.forget_gradients()

    def start_backward(self, loss: Tensor, loss_scale: float) -> None:
        """Prepare for the backward pass of a loss.

        Raises:
            ValueError: If it is the second backward pass of a step under automatic optimization.
        """
        self._backward_passes += 1
        if self._backward_passes > 1 and self.settings.optimization == "automatic":
            name = type(self.recorders[0].optimizer).__name__
            raise ValueError(
                f"The {name} evaluates the loss more than once per step, so that no single "
                "gradient is behind a step; expected a first-order optimizer. Use one, or train "
                "without the callback."
            )
        for recorder in self.recorders:
            recorder.builder.start_backward(loss, loss_scale)
        if not self._has_checked_rows and self.is_recording():
            self._has_checked_rows = True
            self._warn_of_joined_rows()

    def rows_of(self, node: Node) -> SampleLayout | IrregularRows | None:
        """Return where the samples lie in a node of the last graph, if a parameter shows it."""
        known = (recorder.rows.rows_of(node) for recorder in self.recorders)
        return next((rows for rows in known if rows is not None), None)

    def know(self, known: KnownRows) -> None:
        """Take whose rows the batch has, as far as its data show it."""
        for recorder in self.recorders:
            recorder.rows.known = known

    def reorder(self, order: Int[Tensor, " n"]) -> None:
        """Give the rows of the current batch the ids of other samples of it."""
        for recorder in self.recorders:
            recorder.builder.reorder(order)

    def _warn_of_joined_rows(self) -> None:
        """Warn if nothing but their order shows whose the rows of the batch are."""
        count, views = self.rows.joined_rows(), "be two views of the batch, one below the other"
        if count > 1:
            self.settings.warn(
                f"GradientRecorder: no operation of the loss has an axis of {self.batch_size} "
                f"entries, the samples of the batch; there are {count} rows per sample instead. "
                f"They are taken to {views if count == 2 else 'follow one another'}. If the loader "
                "or `training_step` has them in another order, ids are wrong. Load batches of one "
                "sample then, or return the id of each row with `sample_ids=`. If the rows of a "
                "sample follow one another, state it with `batch_dims={'*': 'flattened'}`."
            )

    def end_backward(self) -> None:
        """Collect the rows of that backward pass."""
        for recorder in self.recorders:
            recorder.builder.end_backward()

    def before_step(self, index: int, epoch: int, optimizer: Optimizer) -> None:
        """Read the hyper-parameters that an optimizer is about to use."""
        self._unseen_steps.before_step(index, optimizer)
        for recorder in self.recorders:
            if recorder.optimizer is optimizer:
                recorder.warn_of_unrecorded_parameters()
                recorder.builder.before_step(index, epoch, optimizer)
                if self._backward_passes == 0 and self.settings.optimization == "automatic":
                    recorder.warn_of_other_gradients()
                recorder.steps_taken += 1
                recorder.is_announced = True

    def before_clipping(self, index: int, optimizer: Optimizer, bound: float) -> None:
        """Account for clipping by value that is about to change an optimizer's gradients."""
        for recorder in self.recorders:
            if recorder.optimizer is optimizer:
                recorder.before_clipping(index, bound)

    def end_batch(self) -> None:
        """Discard the rows of a batch that led to no step."""
        for recorder in self.recorders:
            recorder.builder.drop_batch()
        self._unseen_steps.end_batch(self._backward_passes > 0)

    def state(self) -> list[dict[str, Any]]:
        """Return the state of each optimizer's recorder for a checkpoint, in builtins."""
        return [
            {"taken": recorder.steps_taken, **recorder.builder.state()}
            for recorder in self.recorders
        ]

    def resume(
        self,
        steps: int,
        states: Sequence[Mapping[str, Any]],
        preconditioner: Preconditioner | None,
    ) -> None:
        """Continue from a checkpoint after ``steps`` steps of all optimizers together.

        ``states`` is the result of :meth:`state`, or nothing. The preconditioner is that of the
        last stored step.
        """
        if preconditioner is not None:
            self._joint_preconditioner.load(preconditioner)
        states = states or [{}] * len(self.recorders)
        for recorder, state in zip(self.recorders, states, strict=True):
            recorder.steps_taken = state.get("taken", steps // self._n_optimizers)
            rest = {key: value for key, value in state.items() if key != "taken"}
            recorder.builder.resume(rest, preconditioner)

    def accept(self) -> None:
        """Warn of what would be refused in a new run, since this run was accepted earlier."""
        for recorder in self.recorders:
            recorder.builder.accept()

    def _after_step(self, recorder: OptimizerRecorder) -> Callable[..., None]:
        # A post hook: it does not fire for steps that the loss scale or the model skips.
        def hook(*_: object) -> None:
            recorder.depth -= 1
            if recorder.depth > 0:
                return
            is_announced, recorder.is_announced = recorder.is_announced, False
            if not is_announced and self.settings.optimization == "automatic":
                recorder.warn_of_lost_step()
            taken = recorder.builder.after_step()
            if taken is not None:
                recorder.check_scaling(taken)  # The next step is measured accordingly.
                self._steps.add(taken, partial(self._keep_step, recorder, taken))
                if not self.may_wait:
                    self.finish_steps()

        return hook

    def finish_steps(self) -> None:
        """Keep all steps that were taken."""
        self._steps.flush()

    def _keep_step(self, recorder: OptimizerRecorder, taken: TakenStep, step: Step) -> None:
        recorder.check_scaling(taken)
        self._keep(step)
