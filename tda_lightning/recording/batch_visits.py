"""BatchVisits: the recorded rows of one batch, until the step that uses its gradient is taken."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from jaxtyping import Int
from torch import Tensor

from tda_lightning.gradients.batch_rows import BatchRows


@dataclass(frozen=True)
class BatchVisits:
    """The visits of one batch.

    Attributes:
        sample_ids: The samples of the batch.
        weight: Weight of each sample's loss in the loss of the backward pass.
        applied: Factor from the gradient of that loss to the gradient that the optimizer uses: it
            removes the loss scale and contains the share of this process.
        recorded: The recorded rows.
    """

    sample_ids: Int[Tensor, " n"]
    weight: float
    applied: float
    recorded: BatchRows


def common_name(losses: Sequence[str]) -> str:
    """Return the name of the loss if all batches have the same, else an empty string."""
    return losses[0] if len(set(losses)) == 1 else ""
