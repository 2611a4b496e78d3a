"""Who trains what: the parameters of each optimizer, and the layers that are theirs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from torch import nn
from torch.nn import Parameter
from torch.optim import Optimizer

from tda_lightning.gradients.layers import BlockSource, LayerSelection, select_layers


def parameters_of(optimizer: Optimizer) -> Iterator[Parameter]:
    """Yield everything that an optimizer trains."""
    for group in optimizer.param_groups:
        yield from group["params"]


def select_trained_layers(
    model: nn.Module, layers: Sequence[str] | None, optimizers: Sequence[Optimizer]
) -> LayerSelection:
    """Find out what of ``model`` is trained by some optimizer and can be recorded.

    Args:
        model: Any module.
        layers: Names of the modules to record; all by default.
        optimizers: All of them.
    """
    selection = select_layers(model, layers)
    idle = {
        source.name
        for block_sources in selection.sources
        if not _owners(block_sources[0].parameters(), optimizers)
        for source in block_sources
    }
    if not idle:
        return selection
    reason = "its parameters are in no optimizer"
    selection = select_layers(model, layers, leave_out=sorted(idle))
    left_out = [
        replace(one, reason=reason) if one.name in idle else one for one in selection.left_out
    ]
    return replace(selection, left_out=tuple(left_out))


def divided(
    selection: LayerSelection, optimizers: Sequence[Optimizer]
) -> Iterator[tuple[tuple[BlockSource, ...], ...]]:
    """Yield, for each optimizer, the layers that feed each block: those that it trains.

    Raises:
        ValueError: If a layer is trained in part, or by several optimizers.
    """
    owners = []
    for block, block_sources in zip(selection.blocks, selection.sources, strict=True):
        found = _owners(block_sources[0].parameters(), optimizers)
        if len(found) != 1 or found[0][1] != len(block.parameters):
            raise ValueError(
                f"The parameters of the {block.layer} `{block.name}` are trained by several "
                "optimizers, or only in part; expected one optimizer that trains all of them. "
                "Give them to one, freeze the others with `requires_grad_(False)`, or leave the "
                "layer out with `layers=[...]`."
            )
        owners.append(found[0][0])
    for optimizer in optimizers:
        pairs = zip(owners, selection.sources, strict=True)
        yield tuple(block_sources if owner is optimizer else () for owner, block_sources in pairs)


def _owners(
    parameters: Sequence[Parameter], optimizers: Sequence[Optimizer]
) -> list[tuple[Optimizer, int]]:
    """Return who trains some of the parameters, and how many."""
    counts = [
        (optimizer, len(set(parameters) & set(parameters_of(optimizer))))
        for optimizer in optimizers
    ]
    return [(optimizer, count) for optimizer, count in counts if count]
