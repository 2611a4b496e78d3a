"""DistributedContext: the processes of a distributed training; independent of Lightning."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


def _single_process_sum(tensor: Tensor) -> Tensor:
    return tensor


@dataclass(frozen=True)
class DistributedContext:
    """The processes that train together; each sees its part of every batch.

    Attributes:
        rank: Rank of this process.
        count: Number of processes; the gradient is the mean over them.
        add: Sums a tensor over all processes; all of them must call it.
    """

    rank: int = 0
    count: int = 1
    add: Callable[[Tensor], Tensor] = _single_process_sum

    def mean(self, tensor: Tensor) -> Tensor:
        """Return the mean over all processes; all of them must call it."""
        return tensor if self.count == 1 else self.add(tensor) / self.count
