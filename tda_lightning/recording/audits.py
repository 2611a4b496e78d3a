"""Audits: what a step looks like before it is taken, and what it has done."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import Parameter

from tda_lightning.gradients.row_recorder import RowRecorder
from tda_lightning.stores.recipe import Block
from tda_lightning.stores.step import Audit


@dataclass(frozen=True)
class Audited:
    """What an audited step looked like before it was taken; sketches, block by block."""

    recorded: Float[Tensor, "blocks k"]
    gradient: Float[Tensor, "blocks k"]
    weights: Float[Tensor, "blocks k"]
    left_out: Tensor


def begin_audit(
    rows: RowRecorder, recorded: Float[Tensor, "blocks k"], trained: Sequence[Parameter]
) -> Audited:
    """Look at a step before it is taken.

    Args:
        rows: What records it.
        recorded: The sums of its rows, block by block.
        trained: All that it is going to move.
    """
    left_out = rows.left_out_gradient(trained)
    return Audited(recorded, rows.sketch_gradient(), rows.sketch_weights(), left_out)


def finish_audit(rows: RowRecorder, before: Audited) -> Audit:
    """Look at the step again, now that it has been taken."""
    update = (rows.sketch_weights() - before.weights).sum(dim=0)
    along = torch.nn.functional.cosine_similarity(update, before.recorded.sum(dim=0), dim=0)
    return Audit(
        gradient=before.gradient.square().sum(dim=1).double().cpu(),
        deviation=(before.recorded - before.gradient).square().sum(dim=1).double().cpu(),
        left_out=float(before.left_out),
        update=float(along.square()),
    )


# Well above what autocast to bfloat16 costs, well below what a missing use of a weight costs.
_TOLERANCE = 0.02


def require_conserved(
    blocks: Sequence[Block],
    recorded: Float[Tensor, "blocks k"],
    actual: Float[Tensor, "blocks k"],
) -> None:
    """Raise unless every block's rows sum to its gradient.

    Args:
        blocks: The recorded layers.
        recorded: Sum of the rows of a step, block by block.
        actual: Sketch of the gradient of that step, block by block.

    Raises:
        ValueError: Naming the block that deviates most.
    """
    sizes = recorded.norm(dim=1).maximum(actual.norm(dim=1))
    deviations = (recorded - actual).norm(dim=1)
    # Blocks whose gradient all but vanishes beside the others' are compared on the scale of those.
    relative = deviations / (sizes + 1e-3 * sizes.max()).clamp_min(1e-30)
    worst = int(relative.argmax())
    if relative[worst] > _TOLERANCE:
        block = blocks[worst]
        raise ValueError(
            f"What was recorded of the {block.layer} `{block.name}` is not its gradient: the rows "
            f"of the first step sum to something {float(relative[worst]):.0%} off. Expected its "
            "weight to act only through calls of the layer; it is also used elsewhere (a "
            "functional call, a shared weight, a gradient hook, a second-order term). Leave the "
            "layer out with `layers=[...]`."
        )
