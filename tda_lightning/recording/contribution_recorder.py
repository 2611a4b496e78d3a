"""ContributionRecorder: from the events of one training to sums of contributions to a probe set."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.optim import Optimizer

from tda_lightning.gradients.parameter_selection import ParameterSelection
from tda_lightning.gradients.row_recorder import RowRecorder
from tda_lightning.gradients.sketching.projectors import Projector
from tda_lightning.recording.settings import RecordingSettings
from tda_lightning.recording.training_recorder import TrainingRecorder
from tda_lightning.stores.step import Preconditioner, Step

Period = Literal["epoch", "run"] | int


class ContributionTable:
    """Sums of contributions over visits, in double precision.

    A sum is for an epoch, the whole run, or a number of steps. ``train_ids`` are sorted; new ones
    are added as they come. ``steps`` counts the steps added so far.
    """

    def __init__(self, n_probe: int, train_ids: Int[Tensor, " n_train"], period: Period) -> None:
        self._n_probe = n_probe
        self.train_ids = train_ids
        self._period = period
        self._sums: dict[int, Tensor] = {}
        self.steps = 0

    @property
    def times(self) -> Int[Tensor, " n_times"]:
        """Epoch, or index of the first step, of each period."""
        return torch.tensor(list(self._sums), dtype=torch.int64)

    def values(self) -> Float[Tensor, "n_times n_probe n_train"]:
        """Return the sums."""
        empty = torch.zeros(0, self._n_probe, len(self.train_ids), dtype=torch.float64)
        return torch.stack(list(self._sums.values())) if self._sums else empty

    def add(
        self,
        index: int,
        epoch: int,
        sample_ids: Int[Tensor, " n"],
        values: Float[Tensor, "n_probe n"],
    ) -> None:
        """Add the contributions of each visit of a step to each probe."""
        self._add_columns(sample_ids)
        time = self._time(index, epoch)
        if time not in self._sums:
            self._sums[time] = self._zeros()
        columns = torch.searchsorted(self.train_ids, sample_ids)
        self._sums[time].index_add_(1, columns, values.cpu().double())
        self.steps += 1

    def state(self) -> dict[str, Any]:
        """Return the state for a checkpoint: builtins and tensors."""
        return {
            "train_ids": self.train_ids,
            "times": self.times,
            "values": self.values(),
            "steps": self.steps,
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Continue from the result of :meth:`state`.

        Raises:
            ValueError: If its number of probes is different.
        """
        values = state["values"]
        if values.shape[1] != self._n_probe:
            raise ValueError(
                f"The checkpoint has contributions to {values.shape[1]} probes, and `probe` has "
                f"{self._n_probe}; expected the same number. Pass the probes that the "
                "training began with."
            )
        self.train_ids = state["train_ids"].clone()
        times = state["times"].tolist()
        self._sums = {time: sums.clone() for time, sums in zip(times, values, strict=True)}
        self.steps = int(state["steps"])

    def _time(self, index: int, epoch: int) -> int:
        if isinstance(self._period, int):
            return index - index % self._period
        return epoch if self._period == "epoch" else 0

    def _zeros(self) -> Float[Tensor, "n_probe n_train"]:
        return torch.zeros(self._n_probe, len(self.train_ids), dtype=torch.float64)

    def _add_columns(self, sample_ids: Int[Tensor, " n"]) -> None:
        all_ids = torch.unique(torch.cat([self.train_ids, sample_ids]))
        if len(all_ids) == len(self.train_ids):
            return
        columns = torch.searchsorted(all_ids, self.train_ids)
        self.train_ids = all_ids
        for time, sums in self._sums.items():
            self._sums[time] = self._zeros().index_copy_(1, columns, sums)


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
