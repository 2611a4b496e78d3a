"""Conservation: do the recorded rows of a step sum to the gradient that it really took?

They do, by construction, unless a weight is used in a way that no hook sees: through a functional
call, a shared parameter, a hook that rewrites gradients. Comparing the two finds all of these.
"""

from __future__ import annotations

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor

from tda_lightning.stores.recipe import Block

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
