"""Processes: who else records the same training, without a word of Lightning."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


def _alone(tensor: Tensor) -> Tensor:
    return tensor


@dataclass(frozen=True)
class DistributedContext:
    """The processes that train together; each sees its part of every batch.

    Attributes:
        rank: Number of this one.
        count: How many there are; the gradient is the mean over them.
        add: Sums a tensor over all of them, and is to be called by all of them.
    """

    rank: int = 0
    count: int = 1
    add: Callable[[Tensor], Tensor] = _alone

    def mean(self, tensor: Tensor) -> Tensor:
        """Return the mean over all processes; to be called by all of them."""
        return tensor if self.count == 1 else self.add(tensor) / self.count
