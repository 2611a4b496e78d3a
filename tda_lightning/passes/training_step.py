"""What a trainer does with a batch until it has a loss, without a trainer."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from tda_lightning.passes.batches import describe


def require_model(model: Any) -> None:
    """Raise unless something is a module that can be trained by a trainer.

    Raises:
        ValueError: Saying so.
    """
    if not isinstance(model, nn.Module) or not hasattr(model, "training_step"):
        shown = repr(model) if isinstance(model, type) else f"a `{type(model).__name__}`"
        raise ValueError(
            f"`model` is {shown}; expected the LightningModule that was trained: an object with a "
            "`training_step`."
        )


def require_finite_weights(model: nn.Module) -> None:
    """Raise if a model has weights that are NaN or infinite.

    Raises:
        ValueError: Naming the first.
    """
    for name, weight in model.named_parameters():
        if not weight.isfinite().all():
            raise ValueError(
                f"The weights of `model` are not finite: `{name}` holds NaN or infinity. Expected "
                "those of a training that did not diverge; load earlier ones, from a checkpoint."
            )


def step_of(model: Any, batch: Any) -> Any:
    """Return what ``training_step`` returns."""
    # As a trainer sees it: whatever the second argument is called.
    takes_index = len(inspect.signature(model.training_step).parameters) > 1
    return model.training_step(batch, 0) if takes_index else model.training_step(batch)


def loss_of(model: Any, batch: Any) -> Tensor:
    """Return what ``training_step`` makes of a batch.

    Raises:
        TypeError: If it is no loss.
    """
    result = step_of(model, batch)
    loss = result.get("loss") if isinstance(result, Mapping) else result
    if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:
        raise TypeError(
            f"it returned {describe(result)}; expected the loss, a tensor of one number that "
            "depends on the parameters, or a dict with it under 'loss'"
        )
    return loss


def transfer(model: Any, batch: Any) -> Any:
    """Do what a trainer does between the loader and ``training_step``."""
    device = next(model.parameters()).device
    batch = model.on_before_batch_transfer(batch, 0)
    batch = model.transfer_batch_to_device(batch, device, 0)
    return model.on_after_batch_transfer(batch, 0)
