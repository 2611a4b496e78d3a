"""Queries: a query is just another, smaller recording.

The query batch goes through the user's own ``training_step`` under the recipe of the run. That is
why nobody writes a loss function again.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from tda_lightning.layers import find_tensors, survey
from tda_lightning.projectors import projector_from_dict
from tda_lightning.recipe import Recipe
from tda_lightning.rows import RowRecorder
from tda_lightning.stores import Store
from tda_lightning.undisturbed import undisturbed


def record_queries(
    model: nn.Module,
    queries: Any,
    *,
    like: Store,
    at: int = -1,
    mode: Literal["eval", "train"] = "eval",
    progress: bool = True,
) -> Float[Tensor, "n_query k"]:
    """Sketch the gradient of each query's loss at the weights that ``model`` has.

    Args:
        model: The LightningModule that was trained. It is left as it was.
        queries: A batch as the training loader yields them, or a ``DataLoader`` of such batches.
        like: The run to ask: queries are recorded by its recipe.
        at: The step of it in whose coordinates.
        mode: Whether the model acts as in evaluation or as in training.
        progress: Show a progress bar over the batches of a loader.

    Returns:
        One row per query, on the CPU, shape ``(n_query, k)``. Where the run's reduction is
        ``"mean"``, the loss of a batch is taken to be the mean of its samples' losses.

    Raises:
        ValueError: If the model's layers are not the recorded ones, or if ``training_step`` cannot
            take the queries or returns no loss.
    """
    recipe = like.recipe
    surveyed = survey(model, leave_out=[entry.name for entry in recipe.left_out])
    recipe.require_blocks(surveyed.blocks, type(model).__name__)
    projector = projector_from_dict(recipe.projector)
    rows = RowRecorder(model, surveyed, recipe.batch_dims, projector, recipe.torch_dtype)
    coordinates = like.preconditioner(at)
    if coordinates is not None:
        rows.precondition(coordinates)
    with undisturbed(model, mode), rows, torch.enable_grad():
        batches = tqdm(
            _batches(queries), desc="queries", unit="batch", leave=False, disable=not progress
        )
        recorded = [_record_batch(model, rows, batch, recipe) for batch in batches]
    if not recorded:
        raise ValueError("`queries` is an empty loader; expected at least one batch.")
    return torch.cat(recorded)


def _batches(queries: Any) -> Iterator[Any]:
    if isinstance(queries, DataLoader):
        yield from queries
    else:
        yield queries


def _record_batch(
    model: nn.Module, rows: RowRecorder, batch: Any, recipe: Recipe
) -> Float[Tensor, "n k"]:
    n = _batch_size(batch)
    rows.start(n)
    try:
        loss = _loss_of(model, _transfer(model, batch))
        rows.listen(loss)
        trained = [one for one in model.parameters() if one.requires_grad]
        # Not `backward`: the `.grad` of the user's parameters is none of our business.
        torch.autograd.grad(loss, trained, allow_unused=True)
    except (RuntimeError, ValueError, TypeError, LookupError) as error:
        raise ValueError(
            f"`queries` could not go through `{type(model).__name__}.training_step`: expected a "
            f"batch such as the training loader yields; got {_describe(batch)}, and the step said: "
            f"{error}"
        ) from error
    finally:
        found = rows.finish().rows.cpu()
    return found * n if recipe.reduction == "mean" else found


def _loss_of(model: Any, batch: Any) -> Tensor:
    takes_index = "batch_idx" in inspect.signature(model.training_step).parameters
    result = model.training_step(batch, 0) if takes_index else model.training_step(batch)
    loss = result.get("loss") if isinstance(result, Mapping) else result
    if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:
        raise TypeError(
            f"it returned {_describe(result)}; expected the loss, a tensor of one number that "
            "depends on the parameters, or a dict with it under 'loss'"
        )
    return loss


def _transfer(model: Any, batch: Any) -> Any:
    """Do what a trainer does between the loader and ``training_step``."""
    device = next(model.parameters()).device
    batch = model.on_before_batch_transfer(batch, 0)
    batch = model.transfer_batch_to_device(batch, device, 0)
    return model.on_after_batch_transfer(batch, 0)


def _batch_size(batch: Any) -> int:
    first = next(find_tensors(batch), None)
    if first is None or first.ndim == 0:
        raise ValueError(
            f"`queries` holds no tensor with samples along its first axis: got {_describe(batch)}; "
            "expected a batch such as the training loader yields, or a `DataLoader` of such."
        )
    return len(first)


def _describe(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)} ({value.dtype})"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key!r}: {_describe(one)}" for key, one in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "(" + ", ".join(_describe(one) for one in value) + ")"
    return f"a {type(value).__name__}" if value is not None else "nothing"
