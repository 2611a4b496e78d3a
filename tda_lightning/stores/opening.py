"""Open a run given as a path or as a store, and check that it has the needed steps."""

from __future__ import annotations

import os
from numbers import Integral
from pathlib import Path

from tda_lightning.stores.hdf5.store import HDF5Store
from tda_lightning.stores.store import Store


def open_store(run: str | os.PathLike[str] | Store, argument: str) -> Store:
    """Return the store of a run that the user has passed as an argument.

    Raises:
        FileNotFoundError: If there is no run at the path.
        ValueError: If ``run`` is neither the folder of a run nor a store.
    """
    if isinstance(run, Store):
        return run
    if not isinstance(run, str | os.PathLike):
        raise ValueError(
            f"`{argument}` is a `{type(run).__name__}`; expected the folder of a recorded run, or "
            "its store. Only `attribute` accepts several runs: `attribute([run, ...], [model, "
            "...], queries)`."
        )
    return HDF5Store.open(Path(run))


def open_store_at(run: str | os.PathLike[str] | Store, argument: str, at: int) -> Store:
    """Return the store of a run that has a step at a position; negative ones count from the end.

    Raises:
        FileNotFoundError: If there is no run at the path.
        ValueError: If ``run`` is neither the folder of a run nor a store, or has no such step.
    """
    store = open_store(run, argument)
    steps = len(store)
    if not isinstance(at, Integral) or not -steps <= at < steps:
        raise ValueError(
            f"`at` is {at!r}, and `{argument}` has {steps} steps; expected the position of a "
            "step, such as -1 for the last."
        )
    return store


Run = str | os.PathLike[str] | Store


def open_run(run: Run) -> Store:
    """Return the store of a run that holds at least one step.

    Raises:
        FileNotFoundError: If there is no run at the path.
        ValueError: If the run is empty.
    """
    store = open_store(run, "run")
    if len(store) == 0:
        if store is run:  # A store opened here may be empty, and no longer so a moment later.
            _require_opened(store)
        raise ValueError(
            f"The run {_describe(run)} has no step yet; expected at least one. If training is "
            "still running, call `recorder.save_steps()`, or wait; otherwise train again."
        )
    return store


def _require_opened(store: Store) -> None:
    """Check that an empty store is not one to write into, of a folder that holds a run."""
    if not isinstance(store, HDF5Store) or store.run_id is None:
        return
    if len(HDF5Store.open(store.path)):
        raise ValueError(
            f"`HDF5Store({store.name!r})` is a store to record into, and was not opened; expected "
            f"the recorded run. Read it with `HDF5Store.open({store.name!r})`."
        )


def _describe(run: Run) -> str:
    return f"in this `{type(run).__name__}`" if isinstance(run, Store) else f"at `{run}`"
