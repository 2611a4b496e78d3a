"""What the optimizers train, and how: each recorded layer has one optimizer."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn
from torch.nn import Parameter
from torch.optim import ASGD, SGD, Optimizer

from tda_lightning.gradients.parameter_selection import (
    CHOSEN_REASONS,
    ParameterSelection,
    select_parameters,
)
from tda_lightning.recording.optimizer_gradients import parameters_of
from tda_lightning.recording.preconditioning import OptimizerPreconditioner
from tda_lightning.stores.recipe import Recipe
from tda_lightning.stores.step import ParameterGroup


def select_trained_layers(
    model: nn.Module,
    layers: Sequence[str] | None,
    optimizers: Sequence[Optimizer],
    continued: Recipe | None = None,
) -> ParameterSelection:
    """Select the parameters of ``model`` that some optimizer trains.

    ``continued`` is the recipe of a run that this training continues, which may have been recorded
    by an earlier version: its blocks are adopted, and it leaves out the same parameters.
    """
    trained = {parameter for optimizer in optimizers for parameter in parameters_of(optimizer)}
    untrained = {p for p in model.parameters() if p.requires_grad and p not in trained}
    selection = select_parameters(model, layers, untrained)
    adopted = None if continued is None else _adopted(model, selection, untrained, continued)
    return adopted or selection


def _adopted(
    model: nn.Module,
    selection: ParameterSelection,
    untrained: Collection[nn.Parameter],
    continued: Recipe,
) -> ParameterSelection | None:
    """Return the selection of a continued run, if it differs only in ways that versions do."""
    names = {name for block in continued.blocks for name in block.parameters}
    left_out = [entry for entry in continued.left_out if entry.name not in continued.block_names]
    # What an earlier version could not record stays unrecorded.
    unsupported = {entry.name for entry in left_out if entry.reason not in CHOSEN_REASONS}
    selected = {name: block for block in selection.blocks for name in block.parameters}
    is_same = names <= set(selected) and all(
        name in names or unsupported & {name, *block.modules} for name, block in selected.items()
    )
    if not is_same:
        return None
    like = select_parameters(model, sorted(names), untrained, continued.blocks)
    return replace(like, left_out=tuple(left_out))


def split_by_optimizer(
    selection: ParameterSelection, optimizers: Sequence[Optimizer]
) -> Iterator[tuple[tuple[nn.Parameter, ...], ...]]:
    """Yield, for each optimizer, the parameters of each block; none for blocks it does not train.

    Raises:
        ValueError: If a block is trained in part, or by several optimizers.
    """
    block_owners = []
    for block, parameters in zip(selection.blocks, selection.parameters, strict=True):
        owners = _owners(parameters, optimizers)
        if len(owners) != 1 or owners[0][1] != len(block.parameters):
            raise ValueError(
                f"The parameters of the {block.layer} `{block.name}` are trained by several "
                "optimizers, or only in part; expected one optimizer that trains all of them. "
                "Pass all of them to one optimizer, freeze the others with "
                f"`requires_grad_(False)`, or leave it out with `layers=['!{block.name}']`."
            )
        block_owners.append(owners[0][0])
    for optimizer in optimizers:
        pairs = zip(block_owners, selection.parameters, strict=True)
        yield tuple(parameters if owner is optimizer else () for owner, parameters in pairs)


def _owners(
    parameters: Sequence[Parameter], optimizers: Sequence[Optimizer]
) -> list[tuple[Optimizer, int]]:
    """Return the optimizers that train some of the parameters, with the number of these."""
    counts = [
        (optimizer, len(set(parameters) & set(parameters_of(optimizer))))
        for optimizer in optimizers
    ]
    return [(optimizer, count) for optimizer, count in counts if count]


def require_one_rate(optimizer: Optimizer) -> None:
    """Check that all parameter groups have the same learning rate."""
    rates = sorted({group.lr for group in read_groups(optimizer)})
    if len(rates) > 1:
        raise ValueError(
            f"The parameter groups of the {type(optimizer).__name__} have learning rates {rates}; "
            "expected one rate per step, since a raw sketch row mixes all layers. Use one rate, or "
            "record with `preconditioner='optimizer'`."
        )


class HyperparameterReader:
    """Reads the hyper-parameters of one optimizer's parameter groups."""

    def __init__(
        self, selection: ParameterSelection, preconditioner: OptimizerPreconditioner | None
    ) -> None:
        self._preconditioner = preconditioner
        self._sizes = {p: int(p.numel()) for p in selection.all_parameters()}
        self._total = sum(block.size for block in selection.blocks)
        self._first_block = next(n for n, part in enumerate(selection.parameters) if part)
        # The share of each parameter group, by the numbers of parameters in the groups.
        self._shares: dict[tuple[int, ...], list[float]] = {}

    def read(self, optimizer: Optimizer) -> tuple[ParameterGroup, ...]:
        """Return the hyper-parameters of every group, with its share of recorded parameters."""
        is_adaptive = self._preconditioner is not None and self._preconditioner.is_adaptive()
        descent = float(is_adaptive or isinstance(optimizer, SGD | ASGD))
        pairs = zip(read_groups(optimizer), self._shares_of(optimizer), strict=True)
        return tuple(
            replace(group, share=share, descent=descent, owner=float(self._first_block))
            for group, share in pairs
        )

    def _shares_of(self, optimizer: Optimizer) -> list[float]:
        groups = [group["params"] for group in optimizer.param_groups]
        counts = tuple(map(len, groups))
        if counts not in self._shares:
            recorded = [sum(self._sizes.get(p, 0) for p in group) for group in groups]
            self._shares[counts] = [size / self._total for size in recorded]
        return self._shares[counts]


def read_groups(optimizer: Optimizer) -> tuple[ParameterGroup, ...]:
    """Return the current hyper-parameters of every parameter group."""
    return tuple(_read_group(group) for group in optimizer.param_groups)


def _read_group(group: Mapping[str, Any]) -> ParameterGroup:
    # Some optimizers have no betas. Adan has three, of which the first two are used.
    betas: Sequence[float] = group.get("betas", ())
    beta1, beta2, *_ = (*betas, 0.0, 0.0)
    eps = group.get("eps", 0.0)
    return ParameterGroup(
        lr=float(group["lr"]),
        weight_decay=float(group.get("weight_decay", 0.0)),
        momentum=float(group.get("momentum", 0.0)),
        dampening=float(group.get("dampening", 0.0)),
        beta1=float(beta1),
        beta2=float(beta2),
        # Adafactor has a pair; neither is the term that others add to a denominator.
        eps=0.0 if isinstance(eps, tuple | list) else float(eps),
        nesterov=float(group.get("nesterov", False)),
        decoupled=float(group.get("decoupled_weight_decay", False)),
    )
