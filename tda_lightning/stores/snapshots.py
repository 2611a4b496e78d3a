r"""Snapshots: queries at the weights along the way, instead of those at the end.

At the snapshot nearest to each step, TracIn becomes TracInCP,

.. math:: s(q, i) = \sum_{t \,:\, i \in B_t}
   \eta_t \, \langle \nabla \ell_q(\theta_{c(t)}), \, g_i^{(t)} \rangle

Pruthi et al. (2020), "Estimating Training Data Influence by Tracing Gradient Descent", sec. 3. Its
scores are sums over steps, so each step can look for a gradient of its own.

Other methods look for the mean of a query's gradients at snapshots of the later two thirds. At the
end of a training the loss of a query that went well has next to no gradient left, and what is left
is this training's own; other data would have led through weights like those along the way. The
mean agrees better with retraining (``docs/benchmarks.md``).
"""

from __future__ import annotations

import bisect
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tda_lightning.attribution import Attributor, TracIn
from tda_lightning.passes.model_state import with_weights
from tda_lightning.stores import Store, WritableStore, opened
from tda_lightning.stores.step import Step

# Where to ask: at the weights that the model has, at those before a step, or along the way.
Moment = int | Literal["now", "snapshots"]
# Takes the rows of the queries, in the coordinates of the step at a position.
Ask = Callable[[int], Float[Tensor, "n_query k"]]
# More of them change little, and each is a pass over the queries.
MOST = 10


def rows_at(
    store: Store, model: nn.Module, at: Moment, method: Attributor, ask: Ask
) -> Float[Tensor, "n_query width"]:
    """Ask at some weights, in the coordinates of their step (of the nearest recorded one).

    Args:
        store: The run.
        model: The model, which gets its own weights back.
        at: Which weights.
        method: What will take the rows, as :func:`method_at` gave it.
        ask: Takes the rows of the queries.

    Returns:
        The rows for that method: those of all snapshots that are nearest to some step lie side by
        side where each step looks for its own; else their mean.

    Raises:
        ValueError: If there is no such snapshot, or it is another model's.
    """
    if at != "snapshots" or not isinstance(method, _Along):
        return mean_rows_at(store, model, at, ask)
    return torch.cat(list(_each(store, model, [one for one, _ in _parts(store)], ask)), dim=1)


def mean_rows_at(
    store: Store, model: nn.Module, at: Moment, ask: Ask
) -> Float[Tensor, "n_query k"]:
    """Ask at some weights; along the way, at the later snapshots, and average."""
    if at == "now":
        return ask(-1)
    if isinstance(at, str) and at != "snapshots":
        raise ValueError(
            f'`at` is {at!r}; expected "now", "snapshots", or the index of a step that has a '
            "snapshot."
        )
    chosen = later_snapshots(store) if at == "snapshots" else [at]
    return torch.stack(list(_each(store, model, chosen, ask))).mean(dim=0)


def method_at(method: Attributor, at: Moment) -> Attributor:
    """Return the method that takes the rows of :func:`rows_at`.

    Raises:
        ValueError: If it is none that reads a run.
    """
    if not isinstance(method, Attributor):
        raise ValueError(
            f"`method` is {method!r}; expected one that reads a run, `Unrolled()` say. "
            "`FullInfluenceFunction` is asked by `attribute_by_gradients`; `FeatureSimilarity`, "
            "`RepresenterPoint` and `LocalJacobianExpansion` are by `attribute_by_features`."
        )
    return _Along(method) if at == "snapshots" and isinstance(method, TracIn) else method


def describe_weights(store: Store, at: int | Literal["snapshots"], method: object = None) -> str:
    """Say which weights were asked about, in a few words."""
    if at != "snapshots":
        return f"the snapshot before step {at}"
    if isinstance(method, _Along):
        return f"the nearest of {describe_snapshots([one for one, _ in _parts(store)])}"
    return f"the mean of {describe_snapshots(later_snapshots(store))}"


def describe_snapshots(indices: Sequence[int]) -> str:
    """Say how many there are, from where to where."""
    return f"{len(indices)} snapshots, steps {indices[0]} to {indices[-1]}"


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
    return spread(later, MOST)


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


@dataclass(frozen=True)
class _Along(Attributor):
    """Every step looks for the queries at the snapshot nearest to it."""

    method: TracIn

    def require(self, run: Store) -> None:
        """Raise unless the method can be asked of the run."""
        self.method.require(run)

    def directions(
        self, run: Store, queries: Float[Tensor, "n_query width"]
    ) -> Iterator[tuple[Step, Float[Tensor, "n_query k"]]]:
        """Look for what the method does, in each part of the run with the rows that are its own."""
        parts = list(_parts(run))
        for (_, part), rows in zip(parts, queries.chunk(len(parts), dim=1), strict=True):
            yield from self.method.directions(run[part], rows)

    def __repr__(self) -> str:
        """Show the method."""
        return repr(self.method)


def add_snapshots(run: str | Path | WritableStore, checkpoints: Sequence[str | Path]) -> None:
    """Take the weights of a trainer's checkpoints over into a run, as snapshots.

    Args:
        run: The recorded training: its folder or a store.
        checkpoints: Files that a ``ModelCheckpoint`` saved in that training.

    Raises:
        FileNotFoundError: If there is no run at the path, or no file.
        ValueError: If the run cannot be written, or a file is none of a trainer's.
    """
    store = opened(run, "run")
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


def _each(
    store: Store, model: nn.Module, chosen: Sequence[int], ask: Ask
) -> Iterator[Float[Tensor, "n_query k"]]:
    for snapshot in chosen:
        with with_weights(model, store.weights_at(snapshot)):
            yield ask(position_of(store, snapshot))


def _parts(store: Store) -> Iterator[tuple[int, slice]]:
    """Yield the snapshots that are nearest to some steps, with the places of those steps."""
    known = require_snapshots(store)
    nearest = [known[_nearest(index, known)] for index in _indices(store)]
    for snapshot in dict.fromkeys(nearest):
        first = nearest.index(snapshot)
        yield snapshot, slice(first, first + nearest.count(snapshot))
