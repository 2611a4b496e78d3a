"""What a step needs to know of its optimizer: names and numbers, read right before it is taken."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch.nn import Parameter
from torch.optim import ASGD, SGD, Optimizer

from tda_lightning.gradients.layers import LayerSelection
from tda_lightning.recording.preconditioning import PartialPreconditioner
from tda_lightning.stores.step import ParameterGroup


@dataclass(frozen=True)
class HyperparameterReader:
    """What of an optimizer is recorded, and in which coordinates.

    Attributes:
        sizes: Of its recorded parameters.
        total: Sum of the sizes of all that are recorded, whoever trains them.
        owner: Number of the first block that it trains.
        preconditioner: Those of its rows, unless they are raw.
        shares: Of each group, by the numbers of parameters in the groups: the same step after step.
    """

    sizes: Mapping[Parameter, int]
    total: int
    owner: int
    preconditioner: PartialPreconditioner | None
    shares: dict[tuple[int, ...], list[float]] = field(default_factory=dict)

    @classmethod
    def of(
        cls, selection: LayerSelection, preconditioner: PartialPreconditioner | None
    ) -> HyperparameterReader:
        """Look at all recorded layers, with those that the optimizer trains."""
        own = [source for block_sources in selection.sources for source in block_sources[:1]]
        return cls(
            sizes={one: int(one.numel()) for source in own for one in source.parameters()},
            total=sum(block.size for block in selection.blocks),
            owner=next(n for n, block_sources in enumerate(selection.sources) if block_sources),
            preconditioner=preconditioner,
        )

    def read(self, optimizer: Optimizer) -> tuple[ParameterGroup, ...]:
        """Return the hyper-parameters of every parameter group, with what is recorded of it."""
        is_known = self.preconditioner is not None and self.preconditioner.are_known()
        descent = float(is_known or isinstance(optimizer, SGD | ASGD))
        pairs = zip(read_groups(optimizer), self._shares(optimizer), strict=True)
        return tuple(
            replace(one, share=share, descent=descent, owner=float(self.owner))
            for one, share in pairs
        )

    def _shares(self, optimizer: Optimizer) -> list[float]:
        groups = [group["params"] for group in optimizer.param_groups]
        numbers = tuple(map(len, groups))
        if numbers not in self.shares:
            sizes = [sum(self.sizes.get(one, 0) for one in group) for group in groups]
            self.shares[numbers] = [size / self.total for size in sizes]
        return self.shares[numbers]


def read_groups(optimizer: Optimizer) -> tuple[ParameterGroup, ...]:
    """Return the hyper-parameters of every parameter group as they stand."""
    return tuple(_read_group(group) for group in optimizer.param_groups)


def require_one_rate(optimizer: Optimizer) -> None:
    """Raise if the parameter groups' learning rates differ.

    Raises:
        ValueError: Saying which there are.
    """
    rates = sorted({group.lr for group in read_groups(optimizer)})
    if len(rates) > 1:
        raise ValueError(
            f"The parameter groups of the {type(optimizer).__name__} have learning rates {rates}; "
            "expected one rate per step, since a raw sketch row mixes all layers. Use one rate, or "
            "record with `preconditioner='optimizer'`."
        )


def _read_group(group: Mapping[str, Any]) -> ParameterGroup:
    # Others have none, or three, as Adan does: of these the first two.
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
        # Adafactor has a pair: neither is what others add to a denominator.
        eps=0.0 if isinstance(eps, tuple | list) else float(eps),
        nesterov=float(group.get("nesterov", False)),
        decoupled=float(group.get("decoupled_weight_decay", False)),
    )
