"""Receiving: add the gradients of one parameter after another to rows."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from torch import nn

from tda_lightning.gradients.capture.delivery import Receiver
from tda_lightning.gradients.capture.parameter_paths import ParameterGradient
from tda_lightning.gradients.row_sum import RowSum
from tda_lightning.gradients.selection import Place
from tda_lightning.gradients.sketching.sketcher import Sketcher


def receiver(
    rows: RowSum,
    sketcher: Sketcher,
    places: Mapping[nn.Parameter, Place],
    lost: Collection[nn.Parameter],
) -> Receiver:
    """Return a function that adds a parameter's gradients to rows.

    Args:
        rows: The rows.
        sketcher: Shrinks the gradients.
        places: Where each parameter lies.
        lost: Parameters whose gradients are left out.
    """

    def receive(gradient: ParameterGradient) -> None:
        if lost and gradient.parameter in lost:
            return
        place = places[gradient.parameter]
        contribution = gradient.in_rows_of(place.columns)
        start, size = gradient.start // place.columns, gradient.size // place.columns
        values = sketcher.project(place, contribution, start, size)
        rows.add(place.block, values, gradient.dtype)

    return receive
