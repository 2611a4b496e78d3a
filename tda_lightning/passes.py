"""Passes: a batch goes through the user's own ``training_step``, and its rows are recorded.

So do queries and probes, in and after training; that is why nobody writes a loss function again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tda_lightning.batches import batch_size, describe, loss_of, transfer
from tda_lightning.rows import BatchRows, RowRecorder


def record_batch(
    model: nn.Module, rows: RowRecorder, batch: Any, argument: str
) -> tuple[Tensor, BatchRows]:
    """Record what each sample of a batch adds to the gradient of the batch's loss.

    Args:
        model: A LightningModule. Its parameters' ``.grad`` are left alone.
        rows: Records its rows; attached.
        batch: A batch as the training loader yields them.
        argument: What the batch is called where the user has passed it.

    Returns:
        The loss, and what was recorded.

    Raises:
        ValueError: If ``training_step`` cannot take the batch or returns no loss.
    """
    rows.start(batch_size(batch, argument))
    try:
        loss = loss_of(model, transfer(model, batch))
        rows.listen(loss)
        trained = [one for one in model.parameters() if one.requires_grad]
        # Not `backward`: the `.grad` of the user's parameters is none of our business.
        torch.autograd.grad(loss, trained, allow_unused=True)
    except (RuntimeError, ValueError, TypeError, LookupError) as error:
        raise ValueError(
            f"`{argument}` could not go through `{type(model).__name__}.training_step`: expected a "
            f"batch such as the training loader yields; got {describe(batch)}, and the step said: "
            f"{error}"
        ) from error
    finally:
        found = rows.finish()
    return loss.detach(), found
