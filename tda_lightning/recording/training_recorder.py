"""Lanes: one session for every optimizer, each with the layers that it trains."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from jaxtyping import Int
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from tda_lightning.gradients.layers import LayerSelection
from tda_lightning.gradients.sketching.projectors import Projector
from tda_lightning.recording.optimizer_layers import divided
from tda_lightning.recording.optimizer_recorder import OptimizerRecorder, RecordingSettings
from tda_lightning.recording.preconditioning import JointPreconditioner
from tda_lightning.stores.step import Preconditioner, Step


class TrainingRecorder:
    """Passes the events of a training on to the session of each optimizer.

    Args:
        optimizers: All of them.
        selection: What is recorded.
        projector: What it is sketched with.
        settings: What the lanes have in common.
        keep: Called with every step that was taken.
    """

    def __init__(
        self,
        optimizers: Sequence[Optimizer],
        selection: LayerSelection,
        projector: Projector,
        settings: RecordingSettings,
        keep: Callable[[Step], None],
    ) -> None:
        self.selection = selection
        self.projector = projector
        self.settings = settings
        self._keep = keep
        self._whole = JointPreconditioner(selection.blocks)
        parts = [replace(selection, sources=own) for own in divided(selection, optimizers)]
        self._recorders = [
            OptimizerRecorder(optimizer, part, settings, self._whole)
            for optimizer, part in zip(optimizers, parts, strict=True)
            if any(part.sources)
        ]
        self._count = len(optimizers)
        self._handles: list[Any] = []
        self._passes = 0

    @property
    def dimension(self) -> int:
        """Length ``k`` of a row."""
        return self._recorders[0].rows.dimension

    @property
    def widths(self) -> tuple[int, ...] | None:
        """Number of a row's columns that belong to each block, or ``None`` if they share them."""
        return self._recorders[0].rows.widths

    def attach(self, every_n_steps: int) -> None:
        """Begin to listen.

        Args:
            every_n_steps: Record every n-th step of each optimizer.
        """
        for recorder in self._recorders:
            recorder.every_n_steps = every_n_steps
            recorder.rows.__enter__()
            hook = recorder.optimizer.register_step_post_hook(self._step_taken(recorder))
            self._handles.append(hook)

    def detach(self) -> None:
        """Leave no trace."""
        for recorder in self._recorders:
            recorder.rows.__exit__()
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def is_recording(self) -> bool:
        """Say whether a step that is being taken is to be recorded."""
        return any(recorder.is_due() for recorder in self._recorders)

    def extra_backward(self, loss: Tensor, trained: Sequence[Parameter]) -> None:
        """Do all that recording the backward pass of a loss will do, to no effect.

        Args:
            loss: The loss of an automatic step; its graph is kept.
            trained: What the model trains.
        """
        for recorder in self._recorders:
            recorder.rows.extra_backward(loss, trained)

    def take_time(self, clock: Callable[[], float]) -> None:
        """Take the time of making rows, by a clock, until :meth:`time_taken`."""
        for recorder in self._recorders:
            recorder.rows.take_time(clock)

    def time_taken(self) -> float:
        """Return how long making rows took."""
        total = sum(recorder.rows.seconds for recorder in self._recorders)
        for recorder in self._recorders:
            recorder.rows.take_time(None)
        return total

    def record_every(self, every_n_steps: int) -> None:
        """From now on, record every n-th step: the one that is being taken only if it is one."""
        for recorder in self._recorders:
            recorder.every_n_steps = every_n_steps
            if not recorder.is_due():
                recorder.builder.drop_batch()

    def start_batch(self, index: int, sample_ids: Int[Tensor, " n"], share: float) -> None:
        """Expect the forward pass of a batch, where a step of it is to be recorded."""
        self._passes = 0
        for recorder in self._recorders:
            if self.settings.optimization == "manual" or recorder.is_due():
                recorder.builder.start_batch(index, sample_ids, share)

    def forget_gradients(self) -> None:
        """Forget the rows of gradients that are about to be zeroed."""
        for recorder in self._recorders:
            recorder.builder.forget_gradients()

    def start_backward(self, loss: Tensor, loss_scale: float) -> None:
        """Expect the backward pass of a loss.

        Raises:
            ValueError: If it is the second one of an automatic step.
        """
        self._passes += 1
        if self._passes > 1 and self.settings.optimization == "automatic":
            name = type(self._recorders[0].optimizer).__name__
            raise ValueError(
                f"The {name} evaluates the loss more than once per step, so that no single "
                "gradient is behind a step; expected a first-order optimizer. Use one, or train "
                "without the callback."
            )
        for recorder in self._recorders:
            recorder.builder.start_backward(loss, loss_scale)

    def end_backward(self) -> None:
        """Collect the rows of that pass."""
        for recorder in self._recorders:
            recorder.builder.end_backward()

    def before_step(self, index: int, epoch: int, optimizer: Optimizer) -> None:
        """Read what an optimizer is about to use."""
        for recorder in self._recorders:
            if recorder.optimizer is optimizer:
                recorder.warn_of_more()
                recorder.builder.before_step(index, epoch, optimizer)
                recorder.taken += 1

    def before_clipping(self, index: int, optimizer: Optimizer, bound: float) -> None:
        """Follow what clipping by value is about to do to an optimizer's gradients."""
        for recorder in self._recorders:
            if recorder.optimizer is optimizer:
                recorder.before_clipping(index, bound)

    def end_batch(self) -> None:
        """Forget what came to nothing."""
        for recorder in self._recorders:
            recorder.builder.drop_batch()

    def state(self) -> list[dict[str, Any]]:
        """Return what a checkpoint should know, in builtins."""
        return [
            {"taken": recorder.taken, **recorder.builder.state()} for recorder in self._recorders
        ]

    def resume(
        self,
        steps: int,
        states: Sequence[Mapping[str, Any]],
        preconditioner: Preconditioner | None,
    ) -> None:
        """Go on where a checkpoint was saved.

        Args:
            steps: Number of steps that all optimizers have taken together.
            states: What :meth:`state` returned then, or nothing.
            preconditioner: Those of the last stored step.
        """
        if preconditioner is not None:
            self._whole.load(preconditioner)
        for recorder, state in zip(
            self._recorders, states or [{}] * len(self._recorders), strict=True
        ):
            recorder.taken = state.get("taken", steps // self._count)
            rest = {key: value for key, value in state.items() if key != "taken"}
            recorder.builder.resume(rest, preconditioner)

    def _step_taken(self, recorder: OptimizerRecorder) -> Callable[..., None]:
        # A post hook: a step that a loss scale skips, or the model, never gets here.
        def keep(*_: object) -> None:
            step = recorder.builder.after_step()
            if step is not None:
                self._keep(step)

        return keep
