"""Table: what each training sample has contributed to each probe so far, period by period."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

Period = Literal["epoch", "run"] | int


class ContributionTable:
    """Sums over visits, in double precision.

    Args:
        n_probe: How many probes there are.
        train_ids: Ids of the training samples, sorted; more are taken in as they come.
        period: What is summed up together.

    Attributes:
        steps: How many steps have been added.
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
        """Epoch, or first step index, of each period."""
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
        """Add what the visits of a step contributed.

        Args:
            index: Index of the step.
            epoch: Its epoch.
            sample_ids: Which sample each visit was.
            values: What it contributed to each probe.
        """
        self._make_room(sample_ids)
        time = self._time(index, epoch)
        if time not in self._sums:
            self._sums[time] = self._zeros()
        places = torch.searchsorted(self._train_ids, sample_ids)
        self._sums[time].index_add_(1, places, values.double())
        self.steps += 1

    def state(self) -> dict[str, Any]:
        """Return everything, as a checkpoint can hold it."""
        return {
            "train_ids": self._train_ids,
            "times": self.times,
            "values": self.values(),
            "steps": self.steps,
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Take what :meth:`state` returned.

        Raises:
            ValueError: If it is about another number of probes.
        """
        values = state["values"]
        if values.shape[1] != self._n_probe:
            raise ValueError(
                f"The checkpoint has contributions to {values.shape[1]} probes, and `probe` has "
                f"{self._n_probe}; expected the same. Pass the probes that the training was begun "
                "with."
            )
        self._train_ids = state["train_ids"].clone()
        times = state["times"].tolist()
        self._sums = {time: one.clone() for time, one in zip(times, values, strict=True)}
        self.steps = int(state["steps"])

    def _time(self, index: int, epoch: int) -> int:
        if isinstance(self._period, int):
            return index - index % self._period
        return epoch if self._period == "epoch" else 0

    def _zeros(self) -> Float[Tensor, "n_probe n_train"]:
        return torch.zeros(self._n_probe, len(self._train_ids), dtype=torch.float64)

    def _make_room(self, sample_ids: Int[Tensor, " n"]) -> None:
        joined = torch.unique(torch.cat([self._train_ids, sample_ids]))
        if len(joined) == len(self._train_ids):
            return
        places = torch.searchsorted(joined, self._train_ids)
        self._train_ids = joined
        for time, before in self._sums.items():
            self._sums[time] = self._zeros().index_copy_(1, places, before)
