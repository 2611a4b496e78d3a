"""Passes: a batch goes through the user's own ``training_step``, and its rows are recorded.

So do queries and probes, in and after training; that is why nobody writes a loss function again.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tda_lightning.gradients.layers import select_layers
from tda_lightning.gradients.row_recorder import BatchRows, RowRecorder
from tda_lightning.gradients.sketching.projectors import projector_from_dict
from tda_lightning.passes.batches import batch_size, describe
from tda_lightning.passes.model_state import Mode, preserved_state
from tda_lightning.passes.training_step import loss_of, require_model, transfer
from tda_lightning.stores.recipe import Recipe
from tda_lightning.stores.step import Preconditioner


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
        rows.start_backward(loss)
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
        found = rows.end_backward()
    return loss.detach(), found


def own_gradients(found: BatchRows, recipe: Recipe) -> Float[Tensor, "n k"]:
    """Return the gradients of the samples' own losses, of rows of the loss of their batch."""
    return found.rows * len(found.rows) if recipe.reduction == "mean" else found.rows


@contextmanager
def recording(
    model: nn.Module,
    recipe: Recipe,
    preconditioner: Preconditioner | None,
    mode: Mode,
    sampled: float,
    passes: Literal["one", "several"] = "one",
) -> Iterator[RowRecorder]:
    """Record the model by a recipe, and leave it as it was."""
    require_model(model)
    selection = select_layers(model, leave_out=[entry.name for entry in recipe.left_out])
    recipe.require_blocks(selection.blocks, type(model).__name__)
    projector = projector_from_dict(recipe.projector)
    rows = RowRecorder(
        model, selection, recipe.batch_dims, projector, recipe.torch_dtype, sampled, passes
    )
    if preconditioner is not None:
        rows.precondition(preconditioner)
    with preserved_state(model, mode), rows, torch.enable_grad():
        yield rows
