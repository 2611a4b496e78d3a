"""Tracking: from the events of one training to what its steps did for a probe."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.optim import Optimizer

from tda_lightning.gradients.row_recorder import RowRecorder
from tda_lightning.recording.contribution_table import ContributionTable
from tda_lightning.recording.optimizer_recorder import OptimizerRecorder
from tda_lightning.recording.preconditioning import JointPreconditioner
from tda_lightning.stores.step import Preconditioner, Step

# The probes' mean loss, and one row for each.
ProbeRows = tuple[float, Float[Tensor, "n_probe k"]]


@dataclass(frozen=True)
class Summary:
    """What a step did for the probe as a whole.

    Attributes:
        index: Index of the step.
        loss: The probes' mean loss before the step.
        decrease: How much the step lowers it, to first order.
        negative_share: Share of the contributions, of one sample to one probe, that raise it.
    """

    index: int
    loss: float
    decrease: float
    negative_share: float


class ContributionRecorder:
    """Follows the steps of one optimizer and adds what they did for a probe to a table.

    Args:
        lane: The optimizer, and what its steps are recorded with.
        whole: Where the lane's coordinates are.
        table: What contributions are added to.
        every_n_steps: How many steps a tracked one stands for.
    """

    def __init__(
        self,
        recorder: OptimizerRecorder,
        whole: JointPreconditioner,
        table: ContributionTable,
        every_n_steps: int,
    ) -> None:
        self.table = table
        self._lane = recorder
        self._whole = whole
        self._stride = recorder.every_n_steps = every_n_steps
        self._preconditioner: Preconditioner | None = None
        self._probe: ProbeRows | None = None
        self._latest: Summary | None = None
        self._hook: Any = None

    def attach(self) -> None:
        """Begin to listen."""
        self._lane.rows.__enter__()
        self._hook = self._lane.optimizer.register_step_post_hook(self._step_taken)

    def detach(self) -> None:
        """Leave no trace."""
        self._lane.rows.__exit__()
        self._hook.remove()

    def start_batch(self, index: int, sample_ids: Int[Tensor, " n"], share: float) -> None:
        """Expect the forward pass of a batch, if its step is to be tracked."""
        if self._lane.is_due():
            self._lane.builder.start_batch(index, sample_ids, share)

    def forget_gradients(self) -> None:
        """Forget the rows of gradients that are about to be zeroed."""
        self._lane.builder.forget_gradients()

    def start_backward(self, loss: Tensor, loss_scale: float) -> None:
        """Expect the backward pass of its loss."""
        self._lane.builder.start_backward(loss, loss_scale)

    def end_backward(self) -> None:
        """Collect its rows."""
        self._lane.builder.end_backward()

    def before_step(
        self, index: int, epoch: int, record_probe: Callable[[RowRecorder], ProbeRows]
    ) -> None:
        """Take the probe's gradients, at the weights and in the coordinates of the step to come."""
        recorder = self._lane
        recorder.warn_of_more()
        if recorder.is_due():
            recorder.builder.before_step(index, epoch, recorder.optimizer)
            self._probe = record_probe(recorder.rows)
        recorder.taken += 1

    def before_clipping(self, index: int, optimizer: Optimizer, bound: float) -> None:
        """Follow what clipping by value is about to do to an optimizer's gradients."""
        if optimizer is self._lane.optimizer:
            self._lane.before_clipping(index, bound)

    def end_batch(self) -> Summary | None:
        """Forget what came to nothing; return what a tracked step did, if there was one."""
        self._lane.builder.drop_batch()
        latest, self._latest, self._probe = self._latest, None, None
        return latest

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint should know."""
        known = self._preconditioner
        return {
            "taken": self._lane.taken,
            "table": self.table.state(),
            "session": self._lane.builder.state(),
            "coordinates": None if known is None else (known.rows, known.columns),
        }

    def resume(self, state: Mapping[str, Any]) -> None:
        """Go on where :meth:`state` was saved."""
        self._lane.taken = int(state["taken"])
        self.table.load_state(state["table"])
        if state["coordinates"] is not None:
            self._preconditioner = Preconditioner(*state["coordinates"])
            self._whole.load(self._preconditioner)
        self._lane.builder.resume(state["session"], self._preconditioner)

    def _step_taken(self, *_: object) -> None:
        # A post hook: a step that a loss scale skips, or the model, never gets here.
        step = self._lane.builder.after_step()
        if step is None or self._probe is None:
            return
        self._preconditioner = step.preconditioner or self._preconditioner
        loss, rows = self._probe
        self._add(step, loss, rows)

    def _add(self, step: Step, loss: float, rows: Float[Tensor, "n_probe k"]) -> None:
        values = step.lr * (rows @ step.sketch.mT)  # (n_probe, n)
        self.table.add(step.index, step.epoch, step.sample_ids, self._stride * values)
        self._latest = Summary(
            index=step.index,
            loss=loss,
            decrease=float(values.sum(dim=1).mean()),
            negative_share=float((values < 0).to(torch.float64).mean()),
        )
