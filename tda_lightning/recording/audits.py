"""Audits: compare the rows of a step with its gradient and with the update of the weights.

The rows of a step should sum to its gradient. They do, by construction, unless a weight is used in
a way that no hook sees: through a functional call, a shared parameter, a hook that rewrites
gradients. Comparing the two finds all of these.
"""

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
class AuditStart:
    """Sketches of an audited step before the optimizer takes it, block by block.

    Attributes:
        recorded: Sums of its rows.
        gradient: Its gradient.
        weights: The weights before the step.
        left_out: Squared gradient norm of the trained parameters that are not recorded.
    """

    recorded: Float[Tensor, "blocks k"]
    gradient: Float[Tensor, "blocks k"]
    weights: Float[Tensor, "blocks k"]
    left_out: Tensor


def begin_audit(
    rows: RowRecorder, recorded: Float[Tensor, "blocks k"], trained: Sequence[Parameter]
) -> AuditStart:
    """Sketch the gradient and the weights of a step before the optimizer takes it.

    Args:
        rows: The row recorder of the step.
        recorded: The sums of its rows, block by block.
        trained: All parameters that the step will update.
    """
    left_out = rows.left_out_gradient(trained)
    return AuditStart(recorded, rows.sketch_gradient(), rows.sketch_weights(), left_out)


def finish_audit(rows: RowRecorder, start: AuditStart) -> Audit:
    """Return the audit of a step that the optimizer has just taken."""
    update = (rows.sketch_weights() - start.weights).sum(dim=0)
    cosine = torch.nn.functional.cosine_similarity(update, start.recorded.sum(dim=0), dim=0)
    return Audit(
        gradient=start.gradient.square().sum(dim=1).double().cpu(),
        deviation=(start.recorded - start.gradient).square().sum(dim=1).double().cpu(),
        left_out=float(start.left_out),
        update=float(cosine.square()),
    )


# Well above the error of autocast to bfloat16, well below that of an unrecorded use of a weight.
_MAX_RELATIVE_DEVIATION = 0.02


def require_conserved(
    blocks: Sequence[Block],
    recorded: Float[Tensor, "blocks k"],
    actual: Float[Tensor, "blocks k"],
) -> None:
    """Check that the rows of every block sum to its gradient.

    Args:
        blocks: The recorded layers.
        recorded: Sum of the rows of a step, block by block.
        actual: Sketch of the gradient of that step, block by block.

    Raises:
        ValueError: If a block deviates; names the one that deviates most.
    """
    norms = recorded.norm(dim=1).maximum(actual.norm(dim=1))
    deviations = (recorded - actual).norm(dim=1)
    # A gradient that nearly vanishes beside the others' is compared on the scale of the largest.
    relative = deviations / (norms + 1e-3 * norms.max()).clamp_min(1e-30)
    worst = int(relative.argmax())
    if relative[worst] > _MAX_RELATIVE_DEVIATION:
        block = blocks[worst]
        raise ValueError(
            f"The recorded rows of the {block.layer} `{block.name}` do not sum to its gradient: in "
            f"the first step the sum is {float(relative[worst]):.0%} off. Expected its weight to "
            "act only through calls of the layer; it is also used elsewhere (a functional call, a "
            "shared weight, a gradient hook, a second-order term). Leave the layer out with "
            "`layers=[...]`."
        )
