"""Who trains what: the parameters of each optimizer, and the layers that are theirs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from torch import nn
from torch.nn import Parameter
from torch.optim import Optimizer

from tda_lightning.gradients.layers import Source, Survey, survey


def parameters_of(optimizer: Optimizer) -> Iterator[Parameter]:
    """Yield everything that an optimizer trains."""
    for group in optimizer.param_groups:
        yield from group["params"]


def survey_trained(
    model: nn.Module, layers: Sequence[str] | None, optimizers: Sequence[Optimizer]
) -> Survey:
    """Find out what of ``model`` is trained by some optimizer and can be recorded.

    Args:
        model: Any module.
        layers: Names of the modules to record; all by default.
        optimizers: All of them.
    """
    surveyed = survey(model, layers)
    idle = {
        source.name
        for feeding in surveyed.sources
        if not _owners(feeding[0].parameters(), optimizers)
        for source in feeding
    }
    if not idle:
        return surveyed
    reason = "its parameters are in no optimizer"
    surveyed = survey(model, layers, leave_out=sorted(idle))
    left_out = [
        replace(one, reason=reason) if one.name in idle else one for one in surveyed.left_out
    ]
    return replace(surveyed, left_out=tuple(left_out))


def divided(
    surveyed: Survey, optimizers: Sequence[Optimizer]
) -> Iterator[tuple[tuple[Source, ...], ...]]:
    """Yield, for each optimizer, the layers that feed each block: those that it trains.

    Raises:
        ValueError: If a layer is trained in part, or by several optimizers.
    """
    owners = []
    for block, feeding in zip(surveyed.blocks, surveyed.sources, strict=True):
        found = _owners(feeding[0].parameters(), optimizers)
        if len(found) != 1 or found[0][1] != len(block.parameters):
            raise ValueError(
                f"The parameters of the {block.layer} `{block.name}` are trained by several "
                "optimizers, or only in part; expected one optimizer that trains all of them. "
                "Give them to one, freeze the others with `requires_grad_(False)`, or leave the "
                "layer out with `layers=[...]`."
            )
        owners.append(found[0][0])
    for optimizer in optimizers:
        pairs = zip(owners, surveyed.sources, strict=True)
        yield tuple(feeding if owner is optimizer else () for owner, feeding in pairs)


def _owners(
    parameters: Sequence[Parameter], optimizers: Sequence[Optimizer]
) -> list[tuple[Optimizer, int]]:
    """Return who trains some of the parameters, and how many."""
    counts = [
        (optimizer, len(set(parameters) & set(parameters_of(optimizer))))
        for optimizer in optimizers
    ]
    return [(optimizer, count) for optimizer, count in counts if count]
