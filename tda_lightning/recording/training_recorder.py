"""Lanes: one session for every optimizer, each with the layers that it trains."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from jaxtyping import Int
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from tda_lightning.gradients.layers import Survey
from tda_lightning.gradients.sketching.projectors import Projector
from tda_lightning.recording.optimizer_layers import divided
from tda_lightning.recording.optimizer_recorder import Lane, Settings
from tda_lightning.recording.preconditioning import WholeCoordinates
from tda_lightning.stores.step import Preconditioner, Step


class Lanes:
    """Passes the events of a training on to the session of each optimizer.

    Args:
        optimizers: All of them.
        surveyed: What is recorded.
        projector: What it is sketched with.
        settings: What the lanes have in common.
        keep: Called with every step that was taken.
    """

    def __init__(
        self,
        optimizers: Sequence[Optimizer],
        surveyed: Survey,
        projector: Projector,
        settings: Settings,
        keep: Callable[[Step], None],
    ) -> None:
        self.surveyed = surveyed
        self.projector = projector
        self.settings = settings
        self._keep = keep
        self._whole = WholeCoordinates(surveyed.blocks)
        parts = [replace(surveyed, sources=own) for own in divided(surveyed, optimizers)]
        self._lanes = [
            Lane(optimizer, part, settings, self._whole)
            for optimizer, part in zip(optimizers, parts, strict=True)
            if any(part.sources)
        ]
        self._count = len(optimizers)
        self._handles: list[Any] = []
        self._passes = 0

    @property
    def dimension(self) -> int:
        """Length ``k`` of a row."""
        return self._lanes[0].rows.dimension

    @property
    def widths(self) -> tuple[int, ...] | None:
        """Number of a row's columns that belong to each block, or ``None`` if they share them."""
        return self._lanes[0].rows.widths

    def attach(self, every_n_steps: int) -> None:
        """Begin to listen.

        Args:
            every_n_steps: Record every n-th step of each optimizer.
        """
        for lane in self._lanes:
            lane.every_n_steps = every_n_steps
            lane.rows.__enter__()
            hook = lane.optimizer.register_step_post_hook(self._step_taken(lane))
            self._handles.append(hook)

    def detach(self) -> None:
        """Leave no trace."""
        for lane in self._lanes:
            lane.rows.__exit__()
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def is_recording(self) -> bool:
        """Say whether a step that is being taken is to be recorded."""
        return any(lane.is_due() for lane in self._lanes)

    def rehearse(self, loss: Tensor, trained: Sequence[Parameter]) -> None:
        """Do all that recording the backward pass of a loss will do, to no effect.

        Args:
            loss: The loss of an automatic step; its graph is kept.
            trained: What the model trains.
        """
        for lane in self._lanes:
            lane.rows.rehearse(loss, trained)

    def take_time(self, clock: Callable[[], float]) -> None:
        """Take the time of making rows, by a clock, until :meth:`time_taken`."""
        for lane in self._lanes:
            lane.rows.take_time(clock)

    def time_taken(self) -> float:
        """Return how long making rows took."""
        total = sum(lane.rows.seconds for lane in self._lanes)
        for lane in self._lanes:
            lane.rows.take_time(None)
        return total

    def record_every(self, every_n_steps: int) -> None:
        """From now on, record every n-th step: the one that is being taken only if it is one."""
        for lane in self._lanes:
            lane.every_n_steps = every_n_steps
            if not lane.is_due():
                lane.session.drop_batch()

    def start_batch(self, index: int, sample_ids: Int[Tensor, " n"], share: float) -> None:
        """Expect the forward pass of a batch, where a step of it is to be recorded."""
        self._passes = 0
        for lane in self._lanes:
            if self.settings.optimization == "manual" or lane.is_due():
                lane.session.start_batch(index, sample_ids, share)

    def forget_gradients(self) -> None:
        """Forget the rows of gradients that are about to be zeroed."""
        for lane in self._lanes:
            lane.session.forget_gradients()

    def start_backward(self, loss: Tensor, loss_scale: float) -> None:
        """Expect the backward pass of a loss.

        Raises:
            ValueError: If it is the second one of an automatic step.
        """
        self._passes += 1
        if self._passes > 1 and self.settings.optimization == "automatic":
            name = type(self._lanes[0].optimizer).__name__
            raise ValueError(
                f"The {name} evaluates the loss more than once per step, so that no single "
                "gradient is behind a step; expected a first-order optimizer. Use one, or train "
                "without the callback."
            )
        for lane in self._lanes:
            lane.session.start_backward(loss, loss_scale)

    def end_backward(self) -> None:
        """Collect the rows of that pass."""
        for lane in self._lanes:
            lane.session.end_backward()

    def before_step(self, index: int, epoch: int, optimizer: Optimizer) -> None:
        """Read what an optimizer is about to use."""
        for lane in self._lanes:
            if lane.optimizer is optimizer:
                lane.warn_of_more()
                lane.session.before_step(index, epoch, optimizer)
                lane.taken += 1

    def before_clipping(self, index: int, optimizer: Optimizer, bound: float) -> None:
        """Follow what clipping by value is about to do to an optimizer's gradients."""
        for lane in self._lanes:
            if lane.optimizer is optimizer:
                lane.before_clipping(index, bound)

    def end_batch(self) -> None:
        """Forget what came to nothing."""
        for lane in self._lanes:
            lane.session.drop_batch()

    def state(self) -> list[dict[str, Any]]:
        """Return what a checkpoint should know, in builtins."""
        return [{"taken": lane.taken, **lane.session.state()} for lane in self._lanes]

    def resume(
        self,
        steps: int,
        states: Sequence[Mapping[str, Any]],
        coordinates: Preconditioner | None,
    ) -> None:
        """Go on where a checkpoint was saved.

        Args:
            steps: Number of steps that all optimizers have taken together.
            states: What :meth:`state` returned then, or nothing.
            coordinates: Those of the last stored step.
        """
        if coordinates is not None:
            self._whole.load(coordinates)
        for lane, state in zip(self._lanes, states or [{}] * len(self._lanes), strict=True):
            lane.taken = state.get("taken", steps // self._count)
            rest = {key: value for key, value in state.items() if key != "taken"}
            lane.session.resume(rest, coordinates)

    def _step_taken(self, lane: Lane) -> Callable[..., None]:
        # A post hook: a step that a loss scale skips, or the model, never gets here.
        def keep(*_: object) -> None:
            step = lane.session.after_step()
            if step is not None:
                self._keep(step)

        return keep
