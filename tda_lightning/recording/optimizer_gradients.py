"""Gradients of a step: taken beforehand, watched cheaply, joined with those of other batches."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from tda_lightning.gradients.capture import capture_paused


def gradients_of(loss: Tensor, parameters: Sequence[Parameter]) -> dict[Parameter, Tensor]:
    """Return the gradients of the parameters that the loss depends on; its graph is kept."""
    try:
        with capture_paused():
            found = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
    except RuntimeError as error:
        raise ValueError(
            "The gradient of the first steps could not be taken beforehand, which the coordinates "
            f"of an adaptive optimizer need: {error} Expected a loss that can be differentiated "
            "twice over one graph. Use checkpointing with `use_reentrant=False`, or record raw "
            "rows with `GradientRecorder(preconditioner='none')`."
        ) from error
    pairs = zip(parameters, found, strict=True)
    return {parameter: grad for parameter, grad in pairs if grad is not None}


def joined(parts: Sequence[Tensor | None], factors: Sequence[float] | None = None) -> Tensor | None:
    """Join what the batches of a step left, on the CPU; nothing, if one of them left nothing."""
    known = [part for part in parts if part is not None]
    if len(known) < len(parts):
        return None
    if factors is not None:
        pairs = zip(known, factors, strict=True)
        known = [part if factor == 1 else part * factor for part, factor in pairs]
    return (torch.cat(known) if len(known) > 1 else known[0]).cpu()


def smallest_with_gradient(parameters: Iterable[Parameter]) -> Parameter | None:
    """Choose a gradient that is cheap to watch; clipping by norm scales all alike."""
    for parameter in parameters:
        if parameter.grad is not None and bool(parameter.grad.any()):
            return parameter
    return None


def by_size(optimizer: Optimizer) -> list[Parameter]:
    """Return everything that an optimizer trains, the smallest first."""
    parameters = [one for group in optimizer.param_groups for one in group["params"]]
    return sorted(parameters, key=lambda one: int(one.numel()))


def gradient_norm(parameter: Parameter) -> Tensor:
    """Return the norm of a parameter's gradient, in double precision."""
    assert parameter.grad is not None
    norm: Tensor = torch.linalg.vector_norm(parameter.grad, dtype=torch.float64)
    return norm


def clip_coefficient(probe: Parameter | None, norm: Tensor | None) -> Tensor:
    """Return what a gradient was multiplied by since it had that norm."""
    if probe is None or norm is None or probe.grad is None:
        return torch.ones((), dtype=torch.float64)
    # `.grad` survives, clipped, until the next step's `zero_grad`.
    return gradient_norm(probe) / norm
