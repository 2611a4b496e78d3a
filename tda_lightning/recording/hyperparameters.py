"""HyperparameterReader: read an optimizer's hyper-parameters right before its step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch.nn import Parameter
from torch.optim import ASGD, SGD, Optimizer

from tda_lightning.gradients.selection import ParameterSelection
from tda_lightning.recording.preconditioning import PartialPreconditioner
from tda_lightning.stores.step import ParameterGroup


@dataclass(frozen=True)
class HyperparameterReader:
    """Reads the hyper-parameters of one optimizer's parameter groups.

    Attributes:
        sizes: Sizes of the recorded parameters of this optimizer.
        total: Total size of the recorded parameters of all optimizers.
        first_block: Number of the first block that this optimizer trains.
        preconditioner: The preconditioner of its rows, or ``None`` for raw rows.
        shares: Cached shares per parameter group, keyed by the group sizes.
    """

    sizes: Mapping[Parameter, int]
    total: int
    first_block: int
    preconditioner: PartialPreconditioner | None
    shares: dict[tuple[int, ...], list[float]] = field(default_factory=dict)

    @classmethod
    def of(
        cls, selection: ParameterSelection, preconditioner: PartialPreconditioner | None
    ) -> HyperparameterReader:
        """Create the reader from all blocks, with the parameters of this optimizer."""
        return cls(
            sizes={p: int(p.numel()) for p in selection.all_parameters()},
            total=sum(block.size for block in selection.blocks),
            first_block=next(n for n, part in enumerate(selection.parameters) if part),
            preconditioner=preconditioner,
        )

    def read(self, optimizer: Optimizer) -> tuple[ParameterGroup, ...]:
        """Return the hyper-parameters of every group, with its share of recorded parameters."""
        is_adaptive = self.preconditioner is not None and self.preconditioner.is_adaptive()
        descent = float(is_adaptive or isinstance(optimizer, SGD | ASGD))
        pairs = zip(read_groups(optimizer), self._shares(optimizer), strict=True)
        return tuple(
            replace(group, share=share, descent=descent, owner=float(self.first_block))
            for group, share in pairs
        )

    def _shares(self, optimizer: Optimizer) -> list[float]:
        groups = [group["params"] for group in optimizer.param_groups]
        group_sizes = tuple(map(len, groups))
        if group_sizes not in self.shares:
            recorded = [
                sum(self.sizes.get(parameter, 0) for parameter in group) for group in groups
            ]
            self.shares[group_sizes] = [size / self.total for size in recorded]
        return self.shares[group_sizes]


def read_groups(optimizer: Optimizer) -> tuple[ParameterGroup, ...]:
    """Return the current hyper-parameters of every parameter group."""
    return tuple(_read_group(group) for group in optimizer.param_groups)


def require_one_rate(optimizer: Optimizer) -> None:
    """Check that all parameter groups have the same learning rate.

    Raises:
        ValueError: If they differ; lists the rates.
    """
    rates = sorted({group.lr for group in read_groups(optimizer)})
    if len(rates) > 1:
        raise ValueError(
            f"The parameter groups of the {type(optimizer).__name__} have learning rates {rates}; "
            "expected one rate per step, since a raw sketch row mixes all layers. Use one rate, or "
            "record with `preconditioner='optimizer'`."
        )


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
