"""Snapshots: which weights of a run to query, instead of those at the end.

``TracIn`` takes the snapshot nearest to each step (:mod:`tda_lightning.attribution.tracin`).
Other methods look for the mean of a query's gradients at snapshots of the later two thirds. At the
end of a training the loss of a query that went well has next to no gradient left, and what is left
is this training's own; other data would have led through weights like those along the way. The
mean agrees better with retraining (``docs/benchmarks.md``).
"""

from __future__ import annotations

import bisect
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from tda_lightning.stores import Store, WritableStore, open_store

# Where to ask: at the weights that the model has, at those before a step, or along the way.
Moment = int | Literal["now", "snapshots"]
# More of them change little, and each is a pass over the queries.
MAX_SNAPSHOTS = 10


def describe_snapshots(indices: Sequence[int]) -> str:
    """Say how many there are, from where to where."""
    return f"{len(indices)} snapshots, steps {indices[0]} to {indices[-1]}"


def describe_weights(store: Store, at: int | Literal["snapshots"]) -> str:
    """Return a short description of the weights that queries are evaluated at."""
    if at != "snapshots":
        return f"the snapshot before step {at}"
    return f"the mean of {describe_snapshots(later_snapshots(store))}"


def position_of(store: Store, snapshot: int) -> int:
    """Return the place of the step nearest to a snapshot: the step whose coordinates are its."""
    return _nearest(snapshot, _indices(store))


def later_snapshots(store: Store) -> list[int]:
    """Return the snapshots of the later two thirds of a run; ten of them, if there are more.

    Raises:
        ValueError: If there are none.
    """
    first, end = _span(store)
    start = end - 2 * (end - first) / 3
    later = [one for one in require_snapshots(store) if start <= one <= end]
    if not later:
        raise ValueError(
            f"The run has no snapshots of its later two thirds, steps {start:.0f} to {end}; "
            "expected some. Record with `GradientRecorder(..., snapshots=n)` for every n-th step, "
            "or ask at one moment: `at=` the index of a snapshot."
        )
    return spread(later, MAX_SNAPSHOTS)


def own_snapshots(store: Store) -> list[int]:
    """Return the snapshots of the steps of a run, up to that after the last one.

    A slice of a run lists those outside of it as well.

    Raises:
        ValueError: If there are none.
    """
    first, end = _span(store)
    found = [one for one in require_snapshots(store) if first <= one <= end]
    if not found:
        last = end - store.recipe.every_n_steps
        raise ValueError(
            f"The run has no snapshot of the weights at its steps {first} to {last}; expected some."
            " Take a longer part of the run, or record with `GradientRecorder(..., snapshots=n)` "
            "for every n-th step."
        )
    return found


def spread(items: Sequence[int], most: int) -> list[int]:
    """Return all, or the middles of so many equal parts, if there are more.

    >>> spread([0, 1, 2, 3, 4, 5, 6, 7, 8], 3)
    [1, 4, 7]
    """
    count = min(len(items), most)
    return [items[(2 * part + 1) * len(items) // (2 * count)] for part in range(count)]


def add_snapshots(run: str | Path | WritableStore, checkpoints: Sequence[str | Path]) -> None:
    """Take the weights of a trainer's checkpoints over into a run, as snapshots.

    Args:
        run: The recorded training: its folder or a store.
        checkpoints: Files that a ``ModelCheckpoint`` saved in that training.

    Raises:
        FileNotFoundError: If there is no run at the path, or no file.
        ValueError: If the run cannot be written, or a file is none of a trainer's.
    """
    store = open_store(run, "run")
    if not isinstance(store, WritableStore):
        raise ValueError(f"`run` is {store!r}; expected the whole of a run, which keeps weights.")
    if isinstance(checkpoints, str | os.PathLike):
        raise ValueError(
            f"`checkpoints` is one path, {str(checkpoints)!r}; expected a list of them: "
            f"`[{str(checkpoints)!r}]`."
        )
    for path in checkpoints:
        index, weights = _checkpoint(path)
        store.keep_weights(index, weights)


def _checkpoint(path: str | Path) -> tuple[int, dict[str, Tensor]]:
    """Return the number of steps taken, and the weights, that a trainer's checkpoint holds."""
    found = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(found, Mapping) or not {"state_dict", "global_step"} <= set(found):
        raise ValueError(
            f"`{path}` is no checkpoint of a trainer: expected `state_dict` and `global_step` in "
            "it. Pass files that a `ModelCheckpoint` or `trainer.save_checkpoint` has saved."
        )
    # Callbacks that average weights put the average in the place of what was trained.
    state = found.get("current_model_state", found["state_dict"])
    weights = {name: one for name, one in state.items() if isinstance(one, Tensor)}
    return int(found["global_step"]), weights


def _indices(store: Store) -> list[int]:
    return [step.index for step in store.facts]


def _span(store: Store) -> tuple[int, int]:
    """Return the index of the first step, and the index after what the last one stands for."""
    indices = _indices(store)
    return indices[0], indices[-1] + store.recipe.every_n_steps


def _nearest(index: int, among: Sequence[int]) -> int:
    """Return the place of the nearest in a sorted list; of two, the earlier."""
    after = min(bisect.bisect_left(among, index), len(among) - 1)
    before = max(after - 1, 0)
    return after if abs(among[after] - index) < abs(among[before] - index) else before


def require_snapshots(store: Store) -> list[int]:
    """Return the snapshots of a run.

    Raises:
        ValueError: If it has none.
    """
    known = store.snapshots()
    if not known:
        raise ValueError(
            "The run has no snapshots; expected some. Record with `GradientRecorder(..., "
            "snapshots=n)`, or take over checkpoints with `add_snapshots`."
        )
    return known


def nearest_parts(store: Store) -> Iterator[tuple[int, slice]]:
    """Yield the snapshots that are nearest to some steps, with the places of those steps."""
    known = require_snapshots(store)
    nearest = [known[_nearest(index, known)] for index in _indices(store)]
    for snapshot in dict.fromkeys(nearest):
        first = nearest.index(snapshot)
        yield snapshot, slice(first, first + nearest.count(snapshot))
