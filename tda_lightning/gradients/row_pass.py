"""RowPass: the rows of one backward pass."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from jaxtyping import Float
from torch import Tensor, nn

from tda_lightning.gradients.capture.capture import Hold
from tda_lightning.gradients.capture.delivery import Receiver
from tda_lightning.gradients.held_nodes import HeldNodes
from tda_lightning.gradients.receiving import receiver
from tda_lightning.gradients.row_sum import RowSum
from tda_lightning.gradients.selection import Place
from tda_lightning.gradients.sketching.sketcher import Sketcher
from tda_lightning.gradients.waiting_gradients import Coordinates, WaitingGradients
from tda_lightning.stores.step import Preconditioner


class RowPass:
    """Sums the rows of one backward pass.

    Args:
        sketcher: Shrinks and hashes gradients.
        places: Where each parameter lies.
        n: Number of samples.

    Attributes:
        sums: As in :class:`RowSum`.
        preconditioner: The coordinates that the rows have brought about, once they are finished.
    """

    def __init__(self, sketcher: Sketcher, places: Mapping[nn.Parameter, Place], n: int) -> None:
        self._sketcher, self._places, self._n = sketcher, places, n
        self._rows = RowSum(sketcher, n)
        self._held = HeldNodes(sketcher, self._rows, n)
        self._waiting: WaitingGradients | None = None
        self.preconditioner: Preconditioner | None = None

    def sum_blocks(self, sums: Float[Tensor, "blocks k1"] | None) -> None:
        """Add the sum of the rows of each block to ``sums``, as :class:`RowSum` does."""
        self._rows.sums = sums

    def receivers(
        self,
        lost: Collection[nn.Parameter],
        coordinates: Coordinates | None = None,
        is_accumulated_once: bool = True,
    ) -> tuple[Receiver, Hold]:
        """Return the functions to which a capture delivers parameters' gradients, and nodes.

        Args:
            lost: Parameters whose gradients are left out.
            coordinates: The coordinates of the rows, if they follow from the batch's gradient.
            is_accumulated_once: As in :class:`WaitingGradients`.
        """
        receive = receiver(self._rows, self._sketcher, self._places, lost)
        if coordinates is None:
            return receive, self._held.add
        waiting = self._waiting = WaitingGradients(
            coordinates, self._sketcher, self._places, receive, is_accumulated_once
        )
        record = self._held.record
        self._held = HeldNodes(
            self._sketcher,
            self._rows,
            self._n,
            lambda slot, values: waiting.hold(slot, values, record),
        )
        return waiting.receive, self._held.add

    def rows(self) -> Float[Tensor, "n k"]:
        """Return the rows, with all gradients that still wait."""
        self._record_all()
        return self._rows.rows()

    def take(self) -> Float[Tensor, "n k"]:
        """Return the rows, and begin with zeros again."""
        self._record_all()
        return self._rows.take()

    def remove_hooks(self) -> None:
        """Remove all hooks of parameters."""
        if self._waiting is not None:
            self._waiting.remove_hooks()

    def _record_all(self) -> None:
        if self._waiting is not None:
            waiting, self._waiting = self._waiting, None
            self.preconditioner = waiting.finish()
        self._held.finish()
