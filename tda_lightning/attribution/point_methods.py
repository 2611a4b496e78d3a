"""Methods that need no recording: they compare what a layer saw of queries and training samples."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, Literal

from tda_lightning.points import Head, Points
from tda_lightning.scores import Scores


class PointAttributor(ABC):
    """A method of attribution by the features at one layer, with its hyper-parameters.

    Attributes:
        layer: Name of the layer whose inputs are the features; by default the last ``Linear`` that
            is called.
        reads: What it needs to know of that layer.
    """

    layer: str | None
    reads: ClassVar[Literal["features", "head"]] = "features"

    @abstractmethod
    def attribute(self, train: Points, queries: Points) -> Scores:
        """Score every training sample for every query.

        Args:
            train: The training samples, as the layer saw them.
            queries: The queries, as the layer saw them.
        """


def head_of(points: Points) -> Head:
    """Return the layer itself, in float64.

    Raises:
        ValueError: If it was not taken.
    """
    if points.head is None:
        raise ValueError(
            f"The points of `{points.layer}` hold features only; expected outputs and gradients as "
            "well. Take them with `reads='head'`."
        )
    return points.head.double()
