"""What a step needs to know of its optimizer: names and numbers, read right before it is taken."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch.optim import Optimizer

from tda_lightning.step import ParameterGroup


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
    beta1, beta2 = group.get("betas", (0.0, 0.0))
    return ParameterGroup(
        lr=float(group["lr"]),
        weight_decay=float(group.get("weight_decay", 0.0)),
        momentum=float(group.get("momentum", 0.0)),
        dampening=float(group.get("dampening", 0.0)),
        beta1=float(beta1),
        beta2=float(beta2),
        eps=float(group.get("eps", 0.0)),
        nesterov=float(group.get("nesterov", False)),
    )
