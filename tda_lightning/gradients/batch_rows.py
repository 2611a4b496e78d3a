"""BatchRows: the recorded rows of a batch, with properties of its loss."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class BatchRows:
    """The recorded rows of a batch, with properties of its loss.

    Attributes:
        rows: Sketched contribution of each sample to the gradient of the loss, shape ``(n, k)``.
        terms: Number of loss terms that each sample's loss is the mean of, if known.
        spread: Trace of each sample's Hessian with respect to the outputs, divided by its squared
            gradient there, if known. Both are weighted as in the loss of the batch.
        curvature_rows: Rows for labels sampled from the model, if requested; none in a step that is
            not drawn. The expected sum of their outer products is the Gauss-Newton matrix of the
            loss.
        loss: Name of the loss, if known.
    """

    rows: Float[Tensor, "n k"]
    terms: Float[Tensor, " n"] | None
    spread: Float[Tensor, " n"] | None
    curvature_rows: Float[Tensor, "m k"] | None
    loss: str = ""

    def curvature(self, weight: float) -> Float[Tensor, " n"] | None:
        """Return each visit's curvature, as :class:`Step` stores it, if known.

        Args:
            weight: Weight of each sample's loss in the loss of the batch.
        """
        if self.spread is None or self.terms is None:
            return None
        return weight * self.spread / self.terms
