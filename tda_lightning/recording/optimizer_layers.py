"""Assign layers to optimizers: each recorded layer to the optimizer that trains it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from torch import nn
from torch.nn import Parameter
from torch.optim import Optimizer

from tda_lightning.gradients.layers import BlockSource, LayerSelection, select_layers


def parameters_of(optimizer: Optimizer) -> Iterator[Parameter]:
    """Yield all parameters of an optimizer."""
    for group in optimizer.param_groups:
        yield from group["params"]


def select_trained_layers(
    model: nn.Module, layers: Sequence[str] | None, optimizers: Sequence[Optimizer]
) -> LayerSelection:
    """Select the layers of ``model`` that can be recorded and that some optimizer trains.

    Args:
        model: Any module.
        layers: Names of the modules to record; all by default.
        optimizers: All optimizers of the training.
    """
    selection = select_layers(model, layers)
    untrained = {
        source.name
        for block_sources in selection.sources
        if not _owners(block_sources[0].parameters(), optimizers)
        for source in block_sources
    }
    if not untrained:
        return selection
    reason = "its parameters are in no optimizer"
    selection = select_layers(model, layers, leave_out=sorted(untrained))
    left_out = [
        replace(module, reason=reason) if module.name in untrained else module
        for module in selection.left_out
    ]
    return replace(selection, left_out=tuple(left_out))


def split_by_optimizer(
    selection: LayerSelection, optimizers: Sequence[Optimizer]
) -> Iterator[tuple[tuple[BlockSource, ...], ...]]:
    """Yield, for each optimizer, the sources of each block; none for blocks it does not train.

    Raises:
        ValueError: If a layer is trained in part, or by several optimizers.
    """
    block_owners = []
    for block, block_sources in zip(selection.blocks, selection.sources, strict=True):
        owners = _owners(block_sources[0].parameters(), optimizers)
        if len(owners) != 1 or owners[0][1] != len(block.parameters):
            raise ValueError(
                f"The parameters of the {block.layer} `{block.name}` are trained by several "
                "optimizers, or only in part; expected one optimizer that trains all of them. "
                "Pass all of them to one optimizer, freeze the others with "
                "`requires_grad_(False)`, or leave the layer out with `layers=[...]`."
            )
        block_owners.append(owners[0][0])
    for optimizer in optimizers:
        pairs = zip(block_owners, selection.sources, strict=True)
        yield tuple(block_sources if owner is optimizer else () for owner, block_sources in pairs)


def _owners(
    parameters: Sequence[Parameter], optimizers: Sequence[Optimizer]
) -> list[tuple[Optimizer, int]]:
    """Return the optimizers that train some of the parameters, with the number of these."""
    counts = [
        (optimizer, len(set(parameters) & set(parameters_of(optimizer))))
        for optimizer in optimizers
    ]
    return [(optimizer, count) for optimizer, count in counts if count]
