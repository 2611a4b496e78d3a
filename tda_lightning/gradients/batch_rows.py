"""BatchRows: the recorded rows of a batch, with facts of its loss."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from tda_lightning.gradients.losses.loss_summary import LossFacts


@dataclass(frozen=True)
class BatchRows:
    """The recorded rows of a batch, with facts of its loss.

    Attributes:
        rows: Sketched contribution of each sample to the gradient of the loss, shape ``(n, k)``.
        loss: Facts of each sample's loss.
        curvature_rows: Rows for labels sampled from the model, if requested; none in a step that is
            not drawn. The expected sum of their outer products is the Gauss-Newton matrix of the
            loss.
    """

    rows: Float[Tensor, "n k"]
    loss: LossFacts
    curvature_rows: Float[Tensor, "m k"] | None
