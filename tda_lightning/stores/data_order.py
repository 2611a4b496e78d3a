"""The order of the data as a run recorded it: what never came, came twice, or came again."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Int
from torch import Tensor

from tda_lightning.stores.opening import open_store
from tda_lightning.stores.store import Store


@dataclass(frozen=True)
class DataOrder:
    """Which samples came when.

    Attributes:
        never: Ids of training samples that no recorded step saw, sorted.
        repeated: Per epoch, ids that it saw more than once, sorted. Sampling with replacement does
            that, padding for several processes, and an epoch that is resumed in its middle.
        replayed: Steps whose samples were, one for one, those of an earlier step of their epoch.
        same_order: Epochs whose samples came in the order of an earlier epoch, with that epoch.
    """

    never: Int[Tensor, " n_never"]
    repeated: dict[int, Int[Tensor, ...]]
    replayed: tuple[int, ...]
    same_order: dict[int, int]


def data_order(run: str | Path | Store) -> DataOrder:
    """Say in which order the samples of a run came.

    Args:
        run: A recorded training: its folder or a store. Of steps that its stride left out nothing
            is known.

    Raises:
        FileNotFoundError: If there is no run at the path.
        ValueError: If it is something else.
    """
    store = open_store(run, "run")
    epochs: dict[int, list[Tensor]] = {}
    replayed = []
    seen: set[tuple[int, tuple[int, ...]]] = set()
    for step in store.facts:
        epochs.setdefault(step.epoch, []).append(step.sample_ids)
        batch = (step.epoch, tuple(step.sample_ids.tolist()))
        if batch in seen:
            replayed.append(step.index)
        seen.add(batch)
    orders = {epoch: torch.cat(parts) for epoch, parts in epochs.items()}
    visited = torch.cat([torch.empty(0, dtype=torch.int64), *orders.values()])
    known = store.train_ids()
    return DataOrder(
        never=known[~torch.isin(known, visited)],
        repeated={e: found for e, ids in orders.items() if len(found := _more_than_once(ids))},
        replayed=tuple(replayed),
        same_order=_same_orders(orders),
    )


def _more_than_once(ids: Int[Tensor, " n"]) -> Int[Tensor, " m"]:
    found, counts = torch.unique(ids, return_counts=True)
    more: Tensor = found[counts > 1]
    return more


def _same_orders(orders: dict[int, Tensor]) -> dict[int, int]:
    first: dict[tuple[int, ...], int] = {}
    same = {}
    for epoch, ids in orders.items():
        earlier = first.setdefault(tuple(ids.tolist()), epoch)
        if earlier != epoch:
            same[epoch] = earlier
    return same
