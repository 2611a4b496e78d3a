"""Batches: iterate over them, pass one through the ``training_step``, and record its rows.

Queries, probes and passes over training data use this code, so users write no second loss function.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset

from tda_lightning.gradients.losses import UnsampledLossError
from tda_lightning.gradients.parameter_selection import select_like
from tda_lightning.gradients.row_pass import BatchRows
from tda_lightning.gradients.row_recorder import Labels, RowRecorder
from tda_lightning.gradients.sketching.projectors import projector_from_dict
from tda_lightning.passes.batch_contents import batch_size, require_batches
from tda_lightning.passes.drawn_batches import DrawnBatch
from tda_lightning.passes.model_state import Mode, preserved_state, require_model, thawed
from tda_lightning.passes.stand_ins import UnclearLossError, manual_losses
from tda_lightning.recording.sample_ids import SampleLedger, require_once, root_ids
from tda_lightning.results.progress import progress_bar
from tda_lightning.stores.arguments import describe
from tda_lightning.stores.recipe import Recipe
from tda_lightning.stores.step import Preconditioner


@contextmanager
def named_batches(
    ledger: SampleLedger, loader: Any, name: str, progress: bool
) -> Iterator[Iterator[tuple[Int[Tensor, " n"], Any]]]:
    """Yield the ids and the batches of a loader, with a progress bar; restore its sampler."""
    ledger.watch(loader, lambda: True)
    bar = progress_bar(loader, name, "batch", shown=progress)
    try:
        yield ((ledger.name(batch, number), batch) for number, batch in enumerate(bar))
    finally:
        ledger.release()


def columns_by_id(
    parts: Sequence[tuple[Int[Tensor, " n"], Float[Tensor, "m n"]]],
) -> tuple[Int[Tensor, " n_train"], Float[Tensor, "m n_train"]]:
    """Return the ids of all batches, sorted, and their columns in this order.

    Raises:
        ValueError: If ``train_loader`` was empty, or has drawn a sample twice.
    """
    require_batches(parts, "train_loader")
    train_ids, order = torch.cat([ids for ids, _ in parts]).sort()
    require_once(train_ids)
    return train_ids, torch.cat([columns for _, columns in parts], dim=1)[:, order]


def require_loader(loader: Any, argument: str) -> None:
    """Check that an argument is a loader of batches, not a dataset of samples."""
    if isinstance(loader, Dataset):
        raise ValueError(
            f"`{argument}` is a `{type(loader).__name__}`, which yields samples; expected a loader "
            f"of batches such as the model was trained on: `DataLoader({argument}, batch_size=50)`."
        )
    if not isinstance(loader, Iterable):
        raise ValueError(
            f"`{argument}` is {loader!r}; expected a loader of batches such as the model was "
            "trained on."
        )


def select_samples(
    loader: DataLoader[Any], positions: Sequence[int], batch_size: int | None = None
) -> DataLoader[Any]:
    """Return a loader of some samples of another loader's dataset, in the given order.

    By default, the batch size is that of the loader, or 50.
    """
    # Without automatic batching, the function converts one sample.
    collate = loader.collate_fn if loader.batch_sampler is not None else None
    size = batch_size or loader.batch_size or 50
    return DataLoader(Subset(loader.dataset, list(positions)), size, collate_fn=collate)


def root_dataset(dataset: Any) -> Any:
    """Return the dataset below any ``Subset``, which ids of samples index."""
    while isinstance(dataset, Subset):
        dataset = dataset.dataset
    return dataset


def dataset_ids(loader: Any, argument: str) -> Int[Tensor, " n"]:
    """Return the id of each sample of a loader's dataset, in the order of the dataset."""
    dataset = getattr(loader, "dataset", None)
    ids = None if isinstance(dataset, IterableDataset) else root_ids(dataset)
    if not isinstance(loader, DataLoader) or ids is None:
        raise ValueError(
            f"`{argument}` is a `{type(loader).__name__}` of `{type(dataset).__name__}`; expected "
            "a `DataLoader` of a dataset with `__len__` and `__getitem__`, since samples are "
            "selected by their ids."
        )
    return torch.as_tensor(ids, dtype=torch.int64)


def transfer(model: Any, batch: Any) -> Any:
    """Move a batch to the model's device, with the module's hooks that a trainer calls."""
    device = next(model.parameters()).device
    batch = model.on_before_batch_transfer(batch, 0)
    batch = model.transfer_batch_to_device(batch, device, 0)
    return model.on_after_batch_transfer(batch, 0)


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
    losses = manual_losses(model)
    if losses is not None:
        loss = losses.total(loss)
    if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:
        raise TypeError(
            f"`training_step` returned {describe(result)}; expected the loss, a tensor of one "
            "number that depends on the parameters, or a dict that holds it under 'loss'"
        )
    return loss


@contextmanager
def recording(
    model: nn.Module,
    recipe: Recipe,
    preconditioner: Preconditioner | None,
    mode: Mode,
    labels: Labels = "unread",
    layers: Sequence[str] | None = None,
) -> Iterator[RowRecorder]:
    """Attach a row recorder to the model by a recipe, and restore the model afterwards.

    With ``layers``, rows have the gradients of these layers only.
    """
    require_model(model)
    with thawed(model, {name for block in recipe.blocks for name in block.parameters}):
        selection = select_like(model, recipe)
        recipe.require_blocks(selection.blocks, type(model).__name__)
        projector = projector_from_dict(recipe.projector)
        lost = [entry.name for entry in recipe.left_out]
        if layers is not None:
            pairs = zip(recipe.blocks, recipe.selects(layers), strict=True)
            lost += [block.name for block, is_chosen in pairs if not is_chosen]
        dims, dtype = recipe.batch_dims, recipe.torch_dtype
        norms = recipe.normalized
        rows = RowRecorder(model, selection, dims, projector, dtype, labels, lost, norms)
        if preconditioner is not None:
            rows.precondition(preconditioner)
        with preserved_state(model, mode), rows, torch.enable_grad():
            yield rows


def record_batch(
    model: nn.Module, rows: RowRecorder, batch: Any, argument: str, ids: Sized | None = None
) -> tuple[Tensor, BatchRows]:
    """Return the loss of a batch, and each sample's contribution to its gradient.

    The ``.grad`` of the model's parameters does not change.

    Raises:
        ValueError: If ``training_step`` fails on the batch, returns no loss, or draws its samples
            again so that some have no row.
    """
    n = batch_size(batch, argument, ids)
    rows.start(n)
    drawn = DrawnBatch(rows, batch, n)
    failure = f"`{type(model).__name__}.training_step` failed on `{argument}`"
    may_be_trained = argument == "queries" and not model.training
    try:
        with step_errors(failure, batch, model, _IN_EVALUATION if may_be_trained else ""):
            with drawn.followed():
                loss = loss_of(model, transfer(model, batch))
            drawn.show_rows()
            rows.start_backward(loss)
            drawn.read_order(argument)
            # Not `backward`, which would change the `.grad` of the user's parameters.
            torch.autograd.grad(loss, trained_parameters(model), allow_unused=True)
    finally:
        batch_rows = rows.end_backward()
    return loss.detach(), drawn.in_order(batch_rows, argument)


_IN_EVALUATION = (
    " The model is in evaluation mode, where it may return other outputs than in training; if so, "
    'pass `mode="train"`.'
)


@contextmanager
def step_errors(failure: str, batch: Any, model: nn.Module, otherwise: str = "") -> Iterator[None]:
    """Turn errors of the user's code inside the context into one that names the failure.

    Raises:
        ValueError: If anything goes wrong; the message ends in a remedy if one is known, or else
            ``otherwise``.
    """
    try:
        yield
    except (UnsampledLossError, UnclearLossError):
        raise  # The batch is not to blame.
    except (RuntimeError, ValueError, TypeError, LookupError, AttributeError) as error:
        # The class, since the text of a `KeyError` is its key only.
        shown = f"The error was {type(error).__name__}: {str(error).rstrip('.')}."
        raise ValueError(
            f"{failure}: expected a batch as the training loader yields it; got {describe(batch)}. "
            f"{shown}{_remedy_for(error, model) or otherwise}"
        ) from error


def _remedy_for(error: Exception, model: nn.Module) -> str:
    """Return what to do about an error of the user's code, or the empty string."""
    if torch.is_inference_mode_enabled():
        return " There are no gradients inside `torch.inference_mode()`. Call it outside of that."
    if f"'{type(model).__name__}' object has no attribute" in str(error):
        return (
            " A loaded model lacks what was assigned to the fitted one outside of `__init__`. "
            "Assign it here too, or query with the object that was fitted."
        )
    if "'NoneType' object has no attribute" in str(error):
        return (
            " Something is None here that is set in a training, such as `self.logger`, which a "
            "loaded model does not have. Query with the object that was fitted, or set it here: "
            "`model.trainer = pl.Trainer(logger=...)`."
        )
    if "not attached to a `Trainer`" in str(error):
        return (
            " The step uses `self.trainer`, which a loaded model does not have. Give it one, "
            "`model.trainer = pl.Trainer(logger=False)`, query with the object that was fitted, or "
            "pass `target=`, which needs no `training_step`."
        )
    return ""


def trained_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Return the parameters that require a gradient."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def sample_gradients(batch_rows: BatchRows, recipe: Recipe) -> Float[Tensor, "n k"]:
    """Return the gradient of each sample's loss, undoing the mean over the batch."""
    rows = batch_rows.rows
    return rows * len(rows) if recipe.reduction == "mean" else rows
