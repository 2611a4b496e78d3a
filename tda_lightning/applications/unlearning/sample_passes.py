"""Pass single samples of a loader's dataset through a model: their losses and predictions."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.data import DataLoader

from tda_lightning.passes.batches import dataset_ids, loss_of, select_samples, transfer
from tda_lightning.passes.model_state import preserved_state
from tda_lightning.passes.outputs import Outputs
from tda_lightning.results.sample_groups import positions_of, whole_ids
from tda_lightning.stores.snapshots import spread

Ids = Sequence[int] | Int[np.ndarray, " n"] | Int[Tensor, " n"]


def ids_to_forget(forget_ids: Ids, train_ids: Int[Tensor, " n_train"]) -> Int[Tensor, " n"]:
    """Return ids of training samples as a sorted tensor without repetitions."""
    ids = torch.unique(whole_ids(forget_ids, "forget_ids"))
    if not len(ids):
        raise ValueError("`forget_ids` is empty; expected the id of at least one training sample.")
    return train_ids[positions_of(train_ids, ids)]


def batch_of(loader: DataLoader[Any], ids: Int[Tensor, " n"]) -> Any:
    """Return one batch of some samples of a loader's dataset, in the order of their ids."""
    positions = positions_of(dataset_ids(loader, "train_loader"), ids).tolist()
    return next(iter(select_samples(loader, positions, batch_size=len(positions))))


def spread_samples(
    loader: DataLoader[Any], positions: Sequence[int], at_most: int
) -> DataLoader[Any]:
    """Return a loader of single samples: spread evenly over positions."""
    return select_samples(loader, spread(positions, at_most) if positions else [], batch_size=1)


def single_losses(model: nn.Module, samples: Iterable[Any]) -> Float[Tensor, " n"]:
    """Return the loss of every batch of one sample, in evaluation mode."""
    with preserved_state(model, "eval"), torch.enable_grad():
        losses = [loss_of(model, transfer(model, batch)).detach().reshape(()) for batch in samples]
    return torch.stack(losses).cpu() if losses else torch.empty(0)


def single_predictions(
    model: nn.Module, samples: Iterable[Any], outputs: Outputs
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
