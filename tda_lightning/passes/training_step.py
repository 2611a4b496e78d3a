"""Call a model's ``training_step`` on a batch as a trainer does, and return the loss."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from tda_lightning.arguments import describe


def require_model(model: Any) -> None:
    """Check that an object is a module with a ``training_step``.

    Raises:
        ValueError: If it is not.
    """
    if not isinstance(model, nn.Module) or not hasattr(model, "training_step"):
        description = repr(model) if isinstance(model, type) else f"a `{type(model).__name__}`"
        raise ValueError(
            f"`model` is {description}; expected the LightningModule that was trained: an object "
            "with a `training_step`."
        )


def require_finite_weights(model: nn.Module) -> None:
    """Check that no weight of a model is NaN or infinite.

    Raises:
        ValueError: If one is; the message names the first.
    """
    for name, weight in model.named_parameters():
        if not weight.isfinite().all():
            raise ValueError(
                f"The weights of `model` are not finite: `{name}` holds NaN or infinity. Expected "
                "weights from a training that did not diverge; load an earlier checkpoint."
            )


def step_of(model: Any, batch: Any) -> Any:
    """Return the result of ``training_step`` on a batch."""
    # Like a trainer: the name of the second argument does not matter.
    takes_index = len(inspect.signature(model.training_step).parameters) > 1
    return model.training_step(batch, 0) if takes_index else model.training_step(batch)


def loss_of(model: Any, batch: Any) -> Tensor:
    """Return the loss of ``training_step`` on a batch.

    Raises:
        TypeError: If it returns no loss.
    """
    result = step_of(model, batch)
    loss = result.get("loss") if isinstance(result, Mapping) else result
    if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:
        raise TypeError(
            f"`training_step` returned {describe(result)}; expected the loss, a tensor of one "
            "number that depends on the parameters, or a dict that holds it under 'loss'"
        )
    return loss


def transfer(model: Any, batch: Any) -> Any:
    """Move a batch to the model's device, with the module's hooks that a trainer calls."""
    device = next(model.parameters()).device
    batch = model.on_before_batch_transfer(batch, 0)
    batch = model.transfer_batch_to_device(batch, device, 0)
    return model.on_after_batch_transfer(batch, 0)
