r"""Snapshots: queries at the weights along the way, instead of those at the end.

At the snapshot nearest to each step, TracIn becomes TracInCP,

.. math:: s(q, i) = \sum_{t \,:\, i \in B_t}
   \eta_t \, \langle \nabla \ell_q(\theta_{c(t)}), \, g_i^{(t)} \rangle

Pruthi et al. (2020), "Estimating Training Data Influence by Tracing Gradient Descent", sec. 3.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tda_lightning.attribution import Attributor, TracIn
from tda_lightning.attribution.attributor import provenance_of
from tda_lightning.scores import Scores
from tda_lightning.stores import HDF5Store, Store, WritableStore
from tda_lightning.undisturbed import with_weights

# Where to ask: at the weights that the model has, at those before a step, or along the way.
Moment = int | Literal["now", "snapshots"]
# Takes the rows of the queries, in the coordinates of the step at a position.
Ask = Callable[[int], Float[Tensor, "n_query k"]]


def ask_at(store: Store, model: nn.Module, at: int, ask: Ask) -> Float[Tensor, "n_query k"]:
    """Ask at the weights before a step, in its coordinates (those of the nearest recorded step).

    Args:
        store: The run.
        model: The model, which gets its own weights back.
        at: Index of the step.
        ask: Takes the rows.

    Raises:
        ValueError: If there is no snapshot of that step, or it is another model's.
    """
    return _rows_at(store, model, at, ask, _indices(store))


def attribute_along(
    store: Store, model: nn.Module, ask: Ask, method: Attributor, progress: bool
) -> Scores:
    """Attribute every step to the queries at the snapshot nearest to it.

    Args:
        store: The run.
        model: The model, which gets its own weights back.
        ask: Takes the rows of the queries.
        method: :class:`~tda_lightning.TracIn`, whose scores are sums over steps.
        progress: Show progress bars.

    Raises:
        ValueError: If there is no snapshot, or the method is another.
    """
    if not isinstance(method, TracIn):
        raise ValueError(
            f'`at="snapshots"` came with `{method!r}`; expected `TracIn()`, whose scores are sums '
            "over steps. Ask this method at one moment: `at=` the index of a snapshot."
        )
    known = store.snapshots()
    if not known:
        raise ValueError(
            "The run has no snapshots; expected some. Record with `GradientRecorder(..., "
            "snapshots=n)`, or take over checkpoints with `add_snapshots`."
        )
    parts = []
    used = []
    indices = _indices(store)
    for snapshot, part in _parts(indices, known):
        rows = _rows_at(store, model, snapshot, ask, indices)
        parts.append(method.attribute(store[part], rows, progress=progress))
        used.append(snapshot)
    weights = f"the nearest of {len(used)} snapshots, steps {used[0]} to {used[-1]}"
    return _summed(store, parts, weights)


def add_snapshots(run: str | Path | WritableStore, checkpoints: Sequence[str | Path]) -> None:
    """Take the weights of a trainer's checkpoints over into a run, as snapshots.

    Args:
        run: The recorded training: its folder or a store.
        checkpoints: Files that a ``ModelCheckpoint`` saved in that training.

    Raises:
        FileNotFoundError: If there is no run at the path.
    """
    store = run if isinstance(run, WritableStore) else HDF5Store.open(run)
    for path in checkpoints:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        # Callbacks that average weights put the average in the place of what was trained.
        state = checkpoint.get("current_model_state", checkpoint["state_dict"])
        weights = {name: one for name, one in state.items() if isinstance(one, Tensor)}
        store.keep_weights(int(checkpoint["global_step"]), weights)


def _indices(store: Store) -> list[int]:
    return [index for index, _, _ in store.visits()]


def _rows_at(
    store: Store, model: nn.Module, at: int, ask: Ask, indices: Sequence[int]
) -> Float[Tensor, "n_query k"]:
    with with_weights(model, store.weights_at(at)):
        return ask(_nearest(at, indices))


def _nearest(index: int, among: Sequence[int]) -> int:
    """Return the place of the nearest in a sorted list; of two, the earlier."""
    after = min(bisect.bisect_left(among, index), len(among) - 1)
    before = max(after - 1, 0)
    return after if abs(among[after] - index) < abs(among[before] - index) else before


def _parts(indices: Sequence[int], snapshots: Sequence[int]) -> Iterator[tuple[int, slice]]:
    """Yield the snapshots that are nearest to some steps, with the places of those steps."""
    nearest = [snapshots[_nearest(index, snapshots)] for index in indices]
    for snapshot in dict.fromkeys(nearest):
        first = nearest.index(snapshot)
        yield snapshot, slice(first, first + nearest.count(snapshot))


def _summed(store: Store, parts: Sequence[Scores], weights: str) -> Scores:
    ids = store.train_ids()
    total = parts[0].values.new_zeros(len(parts[0].values), len(ids))
    for part in parts:
        total.index_add_(1, torch.searchsorted(ids, part.train_ids), part.values)
    return replace(
        parts[0],
        values=total,
        train_ids=ids,
        provenance={**provenance_of(store), "weights": weights},
    )
