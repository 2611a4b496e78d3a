"""ContributionRecorder: from the events of one training to the contributions to a probe set."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.optim import Optimizer

from tda_lightning.gradients.parameter_selection import ParameterSelection
from tda_lightning.gradients.row_recorder import RowRecorder
from tda_lightning.gradients.sketching.projectors import Projector
from tda_lightning.recording.contribution_table import ContributionTable
from tda_lightning.recording.settings import RecordingSettings
from tda_lightning.recording.training_recorder import TrainingRecorder
from tda_lightning.stores.step import Preconditioner, Step

# The probes' mean loss, and one row for each.
ProbeRows = tuple[float, Float[Tensor, "n_probe k"]]


@dataclass(frozen=True)
class StepSummary:
    """The effect of one step on the probe set as a whole.

    Attributes:
        index: Index of the step.
        loss: The probes' mean loss before the step.
        decrease: How much the step lowers it, to first order.
        negative_share: Share of the contributions (of one sample to one probe) that raise it.
    """

    index: int
    loss: float
    decrease: float
    negative_share: float


class ContributionRecorder(TrainingRecorder):
    """Records the steps of one optimizer, and adds their contributions to a table.

    Rows are used once and not stored. Each tracked step represents ``every_n_steps``.
    """

    may_wait = False

    def __init__(
        self,
        optimizer: Optimizer,
        selection: ParameterSelection,
        projector: Projector,
        settings: RecordingSettings,
        table: ContributionTable,
        every_n_steps: int,
    ) -> None:
        super().__init__([optimizer], selection, projector, settings, self._add_step)
        self.table = table
        self._optimizer = optimizer
        self._every_n_steps = every_n_steps
        self._preconditioner: Preconditioner | None = None
        self._probe: ProbeRows | None = None
        self._latest: StepSummary | None = None

    def before_tracked_step(
        self, index: int, epoch: int, record_probe: Callable[[RowRecorder], ProbeRows]
    ) -> None:
        """Read the hyper-parameters of the next step, and record the probe if the step is due.

        ``record_probe`` records the probe at the weights and in the coordinates of the step.
        """
        is_due = self.is_recording()
        self.before_step(index, epoch, self._optimizer)
        if is_due:
            self._probe = record_probe(self.rows)

    def end_tracked_batch(self) -> StepSummary | None:
        """Discard unused rows; return the summary of the tracked step, if the batch ended one."""
        self.end_batch()
        latest, self._latest, self._probe = self._latest, None, None
        return latest

    def tracker_state(self) -> dict[str, Any]:
        """Return the state for a checkpoint: builtins and tensors."""
        (state,) = self.state()
        steps_taken = state.pop("taken")
        factors = self._preconditioner
        return {
            "taken": steps_taken,
            "table": self.table.state(),
            "session": state,
            "coordinates": None if factors is None else (factors.rows, factors.columns),
        }

    def resume_tracker(self, state: Mapping[str, Any]) -> None:
        """Continue from the result of :meth:`tracker_state`."""
        self.table.load_state(state["table"])
        if state["coordinates"] is not None:
            self._preconditioner = Preconditioner(*state["coordinates"])
        steps_taken = int(state["taken"])
        states = [{"taken": steps_taken, **state["session"]}]
        self.resume(steps_taken, states, self._preconditioner)

    def _add_step(self, step: Step) -> None:
        if self._probe is None:
            return
        self._preconditioner = step.preconditioner or self._preconditioner
        loss, rows = self._probe
        values = step.lr * (rows @ step.sketch.mT)  # (n_probe, n)
        self.table.add(step.index, step.epoch, step.sample_ids, self._every_n_steps * values)
        self._latest = StepSummary(
            index=step.index,
            loss=loss,
            decrease=float(values.sum(dim=1).mean()),
            negative_share=float((values < 0).to(torch.float64).mean()),
        )
