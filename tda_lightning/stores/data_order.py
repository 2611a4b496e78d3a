"""Report the order of a run's training data: unseen samples, repeats and replayed steps."""

from __future__ import annotations

from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from jaxtyping import Int
from torch import Tensor

from tda_lightning.stores.opening import open_store
from tda_lightning.stores.store import Store

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class DataOrder:
    """Irregularities in the order of the training data.

    Attributes:
        never: Ids of training samples in no recorded step, sorted.
        repeated: Per epoch, ids that occur more than once, sorted. Causes: sampling with
            replacement, padding for several processes, or an epoch resumed in its middle.
        replayed: Indices of steps with the same batch as an earlier step of their epoch.
        same_order: Maps an epoch to the earlier epoch whose samples came in the same order.
    """

    never: Int[Tensor, " n_never"]
    repeated: dict[int, Int[Tensor, ...]]
    replayed: tuple[int, ...]
    same_order: dict[int, int]

    def to_pandas(self) -> pd.DataFrame:
        """Return a data frame with a row per irregularity (needs ``pandas``).

        Its columns are ``kind``, ``epoch``, ``train_id``, ``step`` and ``earlier_epoch``;
        those that do not apply to a kind are missing.
        """
        import pandas as pd

        rows: list[dict[str, object]] = [
            {"kind": "never seen", "train_id": sample} for sample in self.never.tolist()
        ]
        for epoch, ids in self.repeated.items():
            repeated = {"kind": "seen again in one epoch", "epoch": epoch}
            rows += [{**repeated, "train_id": sample} for sample in ids.tolist()]
        rows += [{"kind": "step replayed", "step": step} for step in self.replayed]
        for epoch, earlier in self.same_order.items():
            rows.append({"kind": "same order", "epoch": epoch, "earlier_epoch": earlier})
        numbers = ["epoch", "train_id", "step", "earlier_epoch"]
        frame = pd.DataFrame(rows, columns=["kind", *numbers])
        return frame.astype(dict.fromkeys(numbers, "Int64"))

    def _repr_html_(self) -> str:
        """Show one line per kind of irregularity in notebooks."""
        return f"<pre>{escape(repr(self))}</pre>"

    def summary(self) -> dict[str, str]:
        """Return the number of cases of each kind, and the first of them, in words."""
        repeated = [f"{len(ids):,} in epoch {epoch}" for epoch, ids in self.repeated.items()]
        same = [f"{epoch} as {earlier}" for epoch, earlier in self.same_order.items()]
        return {
            "never seen": _listed(list(map(str, self.never.tolist()))),
            "seen again in one epoch": _listed(repeated),
            "steps replayed": _listed(list(map(str, self.replayed))),
            "epochs in the same order": _listed(same),
        }

    def __repr__(self) -> str:
        lines = (f"  {name:<24}  {cases}" for name, cases in self.summary().items())
        return "\n".join(["DataOrder", *lines])


def _listed(items: list[str]) -> str:
    more = ", ..." if len(items) > 8 else ""
    return f"{len(items):,}: {', '.join(items[:8])}{more}" if items else "none"


def data_order(run: str | Path | Store) -> DataOrder:
    """Report irregularities in the order of a run's training data.

    Args:
        run: A recorded training: its folder or its store. Steps skipped by its stride are not
            covered.

    Raises:
        FileNotFoundError: If there is no run at the path.
        ValueError: If ``run`` is neither the folder of a run nor a store.
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
    train_ids = store.train_ids()
    return DataOrder(
        never=train_ids[~torch.isin(train_ids, visited)],
        repeated={e: twice for e, ids in orders.items() if len(twice := _duplicates(ids))},
        replayed=tuple(replayed),
        same_order=_same_orders(orders),
    )


def _duplicates(ids: Int[Tensor, " n"]) -> Int[Tensor, " m"]:
    distinct, counts = torch.unique(ids, return_counts=True)
    duplicates: Tensor = distinct[counts > 1]
    return duplicates


def _same_orders(orders: dict[int, Tensor]) -> dict[int, int]:
    first_epochs: dict[tuple[int, ...], int] = {}
    same_orders = {}
    for epoch, ids in orders.items():
        earlier = first_epochs.setdefault(tuple(ids.tolist()), epoch)
        if earlier != epoch:
            same_orders[epoch] = earlier
    return same_orders
