"""Pass single samples of a loader's dataset through a model: their losses and predictions."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from tda_lightning.passes.batches import loss_of, select_samples, transfer
from tda_lightning.passes.model_state import preserved_state
from tda_lightning.passes.targets import Target
from tda_lightning.recording.sample_ids import root_ids
from tda_lightning.stores.snapshots import spread

Ids = Sequence[int] | Int[np.ndarray, " n"] | Int[Tensor, " n"]


def ids_tensor(name: str, ids: Ids) -> Int[Tensor, " n"]:
    """Return ids as a sorted tensor without repetitions, if they are whole numbers."""
    values = torch.as_tensor(ids)
    if values.ndim != 1 or len(values) == 0 or values.is_floating_point():
        raise ValueError(
            f"`{name}` is {ids!r}; expected at least one whole number, in a list. Pass the ids of "
            "training samples."
        )
    if values.dtype == torch.bool:
        raise ValueError(
            f"`{name}` is a mask; expected ids, whole numbers. Pass `mask.nonzero()[:, 0]`."
        )
    distinct: Tensor = torch.unique(values.to(torch.int64))
    return distinct


def dataset_ids(loader: DataLoader[Any], argument: str) -> Int[Tensor, " n"]:
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


def batch_of(loader: DataLoader[Any], ids: Int[Tensor, " n"]) -> Any:
    """Return one batch of some samples of a loader's dataset, in the order of their ids."""
    all_ids, order = dataset_ids(loader, "train_loader").sort()
    positions = order[torch.searchsorted(all_ids, ids)].tolist()
    return next(iter(select_samples(loader, positions, batch_size=len(positions))))


def spread_samples(
    loader: DataLoader[Any], positions: Sequence[int], at_most: int
) -> DataLoader[Any]:
    """Return a loader of single samples: spread evenly over positions."""
    return select_samples(loader, spread(positions, at_most) if positions else [], batch_size=1)


def sample_losses(model: nn.Module, samples: Iterable[Any]) -> Float[Tensor, " n"]:
    """Return the loss of every batch of one sample, in evaluation mode."""
    with preserved_state(model, "eval"), torch.enable_grad():
        losses = [loss_of(model, transfer(model, batch)).detach().reshape(()) for batch in samples]
    return torch.stack(losses).cpu() if losses else torch.empty(0)


def sample_predictions(
    model: nn.Module, samples: Iterable[Any], outputs: Target
) -> Float[Tensor, "n outputs"]:
    """Return the outputs of every batch of one sample, flattened: class probabilities if possible.

    Outputs of at least two numbers are taken for logits.
    """
    rows = []
    with preserved_state(model, "eval"), torch.no_grad():
        for batch in samples:
            values = outputs(model, transfer(model, batch))
            is_logits = values.ndim > 1 and values.shape[-1] > 1
            rows.append((values.softmax(dim=-1) if is_logits else values).flatten().cpu())
    return torch.stack(rows) if rows else torch.empty(0, 0)
