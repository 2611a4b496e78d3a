r"""Snapshots: queries at the weights along the way, instead of those at the end.

At the snapshot nearest to each step, TracIn becomes TracInCP,

.. math:: s(q, i) = \sum_{t \,:\, i \in B_t}
   \eta_t \, \langle \nabla \ell_q(\theta_{c(t)}), \, g_i^{(t)} \rangle

Pruthi et al. (2020), "Estimating Training Data Influence by Tracing Gradient Descent", sec. 3.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tda_lightning.attribution import Attributor, TracIn
from tda_lightning.step import Step
from tda_lightning.stores import HDF5Store, Store, WritableStore
from tda_lightning.undisturbed import with_weights

# Where to ask: at the weights that the model has, at those before a step, or along the way.
Moment = int | Literal["now", "snapshots"]
# Takes the rows of the queries, in the coordinates of the step at a position.
Ask = Callable[[int], Float[Tensor, "n_query k"]]


def rows_at(store: Store, model: nn.Module, at: Moment, ask: Ask) -> Float[Tensor, "n_query width"]:
    """Ask at some weights, in the coordinates of their step (of the nearest recorded one).

    Args:
        store: The run.
        model: The model, which gets its own weights back.
        at: Which weights.
        ask: Takes the rows of the queries.

    Returns:
        The rows for :func:`method_at`: those of all snapshots that are nearest to some step lie
        side by side.

    Raises:
        ValueError: If there is no such snapshot, or it is another model's.
    """
    if at == "now":
        return ask(-1)
    indices = _indices(store)
    chosen = [snapshot for snapshot, _ in _parts(store)] if at == "snapshots" else [at]
    rows = []
    for snapshot in chosen:
        with with_weights(model, store.weights_at(snapshot)):
            rows.append(ask(_nearest(snapshot, indices)))
    return torch.cat(rows, dim=1)


def method_at(method: Attributor, at: Moment) -> Attributor:
    """Return the method that takes the rows of :func:`rows_at`.

    Raises:
        ValueError: If it cannot be asked along the way, as all but
            :class:`~tda_lightning.TracIn`, whose scores are sums over steps.
    """
    if at != "snapshots":
        return method
    if not isinstance(method, TracIn):
        raise ValueError(
            f'`at="snapshots"` came with `{method!r}`; expected `TracIn()`, whose scores are sums '
            "over steps. Ask this method at one moment: `at=` the index of a snapshot."
        )
    return _Along(method)


def describe_weights(store: Store, at: int | Literal["snapshots"]) -> str:
    """Say which weights were asked about, in a few words."""
    if at != "snapshots":
        return f"the snapshot before step {at}"
    used = [snapshot for snapshot, _ in _parts(store)]
    return f"the nearest of {len(used)} snapshots, steps {used[0]} to {used[-1]}"


@dataclass(frozen=True)
class _Along(Attributor):
    """Every step looks for the queries at the snapshot nearest to it."""

    method: TracIn

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


def _nearest(index: int, among: Sequence[int]) -> int:
    """Return the place of the nearest in a sorted list; of two, the earlier."""
    after = min(bisect.bisect_left(among, index), len(among) - 1)
    before = max(after - 1, 0)
    return after if abs(among[after] - index) < abs(among[before] - index) else before


def _parts(store: Store) -> Iterator[tuple[int, slice]]:
    """Yield the snapshots that are nearest to some steps, with the places of those steps."""
    known = store.snapshots()
    if not known:
        raise ValueError(
            "The run has no snapshots; expected some. Record with `GradientRecorder(..., "
            "snapshots=n)`, or take over checkpoints with `add_snapshots`."
        )
    nearest = [known[_nearest(index, known)] for index in _indices(store)]
    for snapshot in dict.fromkeys(nearest):
        first = nearest.index(snapshot)
        yield snapshot, slice(first, first + nearest.count(snapshot))
