"""Removal curves: how the loss changes when training samples are removed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class RemovalCurve:
    """Changes of the loss of the queries after retraining without training samples.

    Attributes:
        removed: Number or share of removed samples, ascending.
        changes: Changes of the mean loss by method, each as long as ``removed``, such as those of
            :func:`~tda_lightning.metrics.removal_curve`. The key ``"random"`` is for random
            samples; the others are for the most helpful ones by a method.
    """

    removed: Sequence[int] | Sequence[float]
    changes: Mapping[str, Sequence[float]]

    def __post_init__(self) -> None:
        """Check the lengths and the values."""
        if not self.removed or not self.changes:
            raise ValueError("A removal curve is empty; expected some sizes and some changes.")
        for name, values in self.changes.items():
            if len(values) != len(self.removed):
                raise ValueError(
                    f"`changes[{name!r}]` has {len(values)} values; expected {len(self.removed)}, "
                    "one for each entry of `removed`."
                )
            if not all(math.isfinite(value) for value in values):
                raise ValueError(f"`changes[{name!r}]` holds NaN or infinity; expected numbers.")

    @property
    def method(self) -> str | None:
        """The method whose curve ends highest; ``None`` if there are random samples only."""
        methods = [name for name in self.changes if name != RANDOM]
        return max(methods, key=lambda name: self.changes[name][-1], default=None)


RANDOM = "random"
