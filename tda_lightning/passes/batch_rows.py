"""Record the rows of one batch with the user's own ``training_step``.

Queries, probes and passes over training data use this code, so users write no second loss function.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tda_lightning.arguments import describe
from tda_lightning.gradients.layers import select_layers
from tda_lightning.gradients.row_recorder import BatchRows, RowRecorder
from tda_lightning.gradients.sketching.projectors import projector_from_dict
from tda_lightning.passes.batches import batch_size
from tda_lightning.passes.model_state import Mode, preserved_state
from tda_lightning.passes.training_step import loss_of, require_model, transfer
from tda_lightning.stores.recipe import Recipe
from tda_lightning.stores.step import Preconditioner


def record_batch(
    model: nn.Module, rows: RowRecorder, batch: Any, argument: str
) -> tuple[Tensor, BatchRows]:
    """Record each sample's contribution to the gradient of a batch's loss.

    Args:
        model: A LightningModule. The ``.grad`` of its parameters does not change.
        rows: A row recorder that is attached to the model.
        batch: A batch as the training loader yields it.
        argument: Name of the user's argument that the batch comes from, for error messages.

    Returns:
        The loss, and the recorded rows.

    Raises:
        ValueError: If ``training_step`` fails on the batch or returns no loss.
    """
    rows.start(batch_size(batch, argument))
    try:
        loss = loss_of(model, transfer(model, batch))
        rows.start_backward(loss)
        # Not `backward`, which would change the `.grad` of the user's parameters.
        torch.autograd.grad(loss, trained_parameters(model), allow_unused=True)
    except (RuntimeError, ValueError, TypeError, LookupError) as error:
        raise ValueError(
            f"`{type(model).__name__}.training_step` failed on `{argument}`: expected a batch as "
            f"the training loader yields it; got {describe(batch)}. The error was: {error}"
        ) from error
    finally:
        batch_rows = rows.end_backward()
    return loss.detach(), batch_rows


def trained_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Return the parameters that require a gradient."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def sample_gradients(batch_rows: BatchRows, recipe: Recipe) -> Float[Tensor, "n k"]:
    """Return the gradient of each sample's loss, undoing the mean over the batch."""
    rows = batch_rows.rows
    return rows * len(rows) if recipe.reduction == "mean" else rows


@contextmanager
def recording(
    model: nn.Module,
    recipe: Recipe,
    preconditioner: Preconditioner | None,
    mode: Mode,
    sampled: float,
    passes: Literal["one", "several"] = "one",
) -> Iterator[RowRecorder]:
    """Attach a row recorder to the model by a recipe, and restore the model afterwards."""
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
