"""ContributionTable: sum the contributions of training samples to probes, period by period."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

Period = Literal["epoch", "run"] | int


class ContributionTable:
    """Sums of contributions over visits, in double precision.

    A sum is for an epoch, the whole run, or a number of steps. The ids of training samples are
    sorted; new ones are added as they come. ``steps`` counts the steps added so far.
    """

    def __init__(self, n_probe: int, train_ids: Int[Tensor, " n_train"], period: Period) -> None:
        self._n_probe = n_probe
        self._train_ids = train_ids
        self._period = period
        self._sums: dict[int, Tensor] = {}
        self.steps = 0

    @property
    def train_ids(self) -> Int[Tensor, " n_train"]:
        """Ids of the training samples, sorted."""
        return self._train_ids

    @property
    def times(self) -> Int[Tensor, " n_times"]:
        """Epoch, or index of the first step, of each period."""
        return torch.tensor(list(self._sums), dtype=torch.int64)

    def values(self) -> Float[Tensor, "n_times n_probe n_train"]:
        """Return the sums."""
        empty = torch.zeros(0, self._n_probe, len(self._train_ids), dtype=torch.float64)
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
        columns = torch.searchsorted(self._train_ids, sample_ids)
        self._sums[time].index_add_(1, columns, values.double())
        self.steps += 1

    def state(self) -> dict[str, Any]:
        """Return the state for a checkpoint: builtins and tensors."""
        return {
            "train_ids": self._train_ids,
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
        self._train_ids = state["train_ids"].clone()
        times = state["times"].tolist()
        self._sums = {time: sums.clone() for time, sums in zip(times, values, strict=True)}
        self.steps = int(state["steps"])

    def _time(self, index: int, epoch: int) -> int:
        if isinstance(self._period, int):
            return index - index % self._period
        return epoch if self._period == "epoch" else 0

    def _zeros(self) -> Float[Tensor, "n_probe n_train"]:
        return torch.zeros(self._n_probe, len(self._train_ids), dtype=torch.float64)

    def _add_columns(self, sample_ids: Int[Tensor, " n"]) -> None:
        all_ids = torch.unique(torch.cat([self._train_ids, sample_ids]))
        if len(all_ids) == len(self._train_ids):
            return
        columns = torch.searchsorted(all_ids, self._train_ids)
        self._train_ids = all_ids
        for time, sums in self._sums.items():
            self._sums[time] = self._zeros().index_copy_(1, columns, sums)
