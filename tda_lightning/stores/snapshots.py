"""Choose the weight snapshots of a run at which queries are evaluated.

``TracIn`` uses the snapshot nearest to each step (:mod:`tda_lightning.attribution.tracin`). Other
methods average a query's gradients over the snapshots in the last two thirds of the run. At the end
of training, well-fitted queries have almost no gradient left, and the rest is specific to this run.
Weights from earlier in the run are more typical of training on other data. The mean agrees better
with retraining (``docs/benchmarks.md``).
"""

from __future__ import annotations

import bisect
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Literal

import torch
from torch import Tensor

from tda_lightning.stores import Store, WritableStore, open_store
from tda_lightning.stores.arguments import absolute_path
from tda_lightning.stores.integrity.damage import reading

# Weights for queries: the model's, which should be those at the end of the training ("now") or may
# be any ("model"); those before a step; or several snapshots.
Moment = int | Literal["now", "model", "snapshots"]
# More snapshots change little, and each costs a pass over the queries.
MAX_SNAPSHOTS = 10


def describe_snapshots(indices: Sequence[int]) -> str:
    """Return a short description of the number and range of snapshots."""
    return f"{len(indices)} snapshots, steps {indices[0]} to {indices[-1]}"


def describe_weights(store: Store, at: int | Literal["snapshots"]) -> str:
    """Return a short description of the weights that queries are evaluated at."""
    if at != "snapshots":
        return f"the snapshot before step {at}"
    return f"the mean of {describe_snapshots(later_snapshots(store))}"


def position_of(store: Store, snapshot: int) -> int:
    """Return the position of the step nearest to a snapshot, whose coordinates it shares."""
    # By bisection: on disk, the facts of all steps take much longer to read.
    positions = range(len(store))
    after = bisect.bisect_left(positions, snapshot, key=lambda at: store.facts[at].index)
    around = positions[max(after - 1, 0) : after + 1]
    return min(around, key=lambda at: abs(store.facts[at].index - snapshot))


def later_snapshots(store: Store) -> list[int]:
    """Return the snapshots in the last two thirds of a run, at most ``MAX_SNAPSHOTS`` of them.

    Raises:
        ValueError: If there are none.
    """
    require_snapshots(store)
    later = _later_in(store)
    if not later:
        start, end = _last_two_thirds(store)
        raise ValueError(
            f"The run has no snapshots in its last two thirds, steps {start:.0f} to {end}; "
            "expected at least one. Record with `GradientRecorder(..., snapshots=n)` for every "
            "n-th step, or pass the index of a snapshot as `at=`."
        )
    return spread(later, MAX_SNAPSHOTS)


def has_later_snapshots(store: Store) -> bool:
    """Return whether there are snapshots in the last two thirds of a run."""
    return bool(_later_in(store))


def own_snapshots(store: Store) -> list[int]:
    """Return the snapshots within the steps of a run, including the one after its last step.

    ``store.snapshots()`` of a slice also lists the snapshots outside the slice.

    Raises:
        ValueError: If there are none.
    """
    first, end = _span(store)
    inside = [index for index in require_snapshots(store) if first <= index <= end]
    if not inside:
        last = end - store.recipe.every_n_steps
        raise ValueError(
            f"The run has no snapshot of the weights at its steps {first} to {last}; expected at "
            "least one. Use a longer part of the run, or record with `GradientRecorder(..., "
            "snapshots=n)` for every n-th step."
        )
    return inside


def spread(items: Sequence[int], max_items: int) -> list[int]:
    """Return all items; if they are too many, the middles of ``max_items`` equal parts.

    >>> spread([0, 1, 2, 3, 4, 5, 6, 7, 8], 3)
    [1, 4, 7]
    """
    count = min(len(items), max_items)
    return [items[(2 * part + 1) * len(items) // (2 * count)] for part in range(count)]


def add_snapshots(run: str | Path | WritableStore, checkpoints: Sequence[str | Path]) -> None:
    """Add the weights of a trainer's checkpoints to a run, as snapshots.

    Args:
        run: The recorded training: its folder or a store.
        checkpoints: Files saved by a ``ModelCheckpoint`` in that training.

    Raises:
        FileNotFoundError: If there is no run at the path, or a checkpoint does not exist.
        ValueError: If the run cannot be written, or a file is not a Lightning checkpoint, or one of
            another recorded run.
    """
    store = open_store(run, "run")
    if not isinstance(store, WritableStore):
        raise ValueError(
            f"`run` is {store!r}; expected a whole run in a store that can be written. Pass its "
            "folder."
        )
    if isinstance(checkpoints, str | os.PathLike):
        raise ValueError(
            f"`checkpoints` is one path, {str(checkpoints)!r}; expected a list of paths: "
            f"`[{str(checkpoints)!r}]`."
        )
    for path in checkpoints:
        checkpoint = _checkpoint(path)
        _require_run_of(checkpoint, path, store.run_id)
        store.keep_weights(int(checkpoint["global_step"]), _weights_in(checkpoint))


def _checkpoint(path: str | Path) -> Mapping[str, Any]:
    """Return a trainer's checkpoint."""
    file = absolute_path(path)
    if not file.is_file():
        raise FileNotFoundError(
            f"There is no checkpoint at `{file}`; expected a file. Correct the path."
        )
    expected = "a checkpoint saved by a `ModelCheckpoint`, with weights and builtins only"
    with reading(file, expected, "Pass another checkpoint."):
        try:
            checkpoint = torch.load(file, map_location="cpu", weights_only=True)
        except UnpicklingError as error:  # Torch advises to load it without a check.
            raise ValueError("it is no checkpoint, or holds other objects") from error
    if not isinstance(checkpoint, Mapping) or not {"state_dict", "global_step"} <= set(checkpoint):
        raise ValueError(
            f"`{path}` is not a Lightning checkpoint; expected the keys `state_dict` and "
            "`global_step`. Pass files saved by `ModelCheckpoint` or `trainer.save_checkpoint`."
        )
    return checkpoint


def _weights_in(checkpoint: Mapping[str, Any]) -> dict[str, Tensor]:
    # Callbacks that average weights save the average as `state_dict`.
    state = checkpoint.get("current_model_state", checkpoint["state_dict"])
    return {name: value for name, value in state.items() if isinstance(value, Tensor)}


def _require_run_of(checkpoint: Mapping[str, Any], path: str | Path, run: str | None) -> None:
    """Check that a checkpoint is one of the training that a run recorded, if it names its runs."""
    states = [s for s in checkpoint.get("callbacks", {}).values() if isinstance(s, Mapping)]
    runs = {state["run"] for state in states if "run" in state and "steps" in state}
    if runs and run not in runs:
        raise ValueError(
            f"`{path}` is a checkpoint of the run {', '.join(map(repr, sorted(runs)))}; expected "
            f"one of the training that {run!r} recorded. Pass that training's checkpoints."
        )


def _later_in(store: Store) -> list[int]:
    snapshots = store.snapshots()
    if not snapshots:
        return []
    start, end = _last_two_thirds(store)
    return [index for index in snapshots if start <= index <= end]


def _last_two_thirds(store: Store) -> tuple[float, int]:
    first, end = _span(store)
    return end - 2 * (end - first) / 3, end


def _span(store: Store) -> tuple[int, int]:
    """Return the index of the first step, and that after the steps the last one represents."""
    return store.facts[0].index, store.facts[-1].index + store.recipe.every_n_steps


def _nearest(index: int, candidates: Sequence[int]) -> int:
    """Return the position of the nearest value in a sorted list; on a tie, the earlier one."""
    after = min(bisect.bisect_left(candidates, index), len(candidates) - 1)
    before = max(after - 1, 0)
    return after if abs(candidates[after] - index) < abs(candidates[before] - index) else before


def require_snapshots(store: Store) -> list[int]:
    """Return the snapshots of a run.

    Raises:
        ValueError: If it has none.
    """
    snapshots = store.snapshots()
    if not snapshots:
        raise ValueError(
            "The run has no snapshots; expected at least one. Record with `GradientRecorder(..., "
            "snapshots=n)`, or add checkpoints with `add_snapshots`."
        )
    return snapshots


def nearest_parts(store: Store) -> Iterator[tuple[int, slice]]:
    """Yield each snapshot that is nearest to some steps, with the slice of those steps."""
    snapshots = require_snapshots(store)
    nearest = [snapshots[_nearest(step.index, snapshots)] for step in store.facts]
    for snapshot in dict.fromkeys(nearest):
        first = nearest.index(snapshot)
        yield snapshot, slice(first, first + nearest.count(snapshot))
