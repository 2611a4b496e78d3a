"""Opened: a run that was passed as a path or as a store."""

from __future__ import annotations

import os
from numbers import Integral
from pathlib import Path

from tda_lightning.stores.hdf5.store import HDF5Store
from tda_lightning.stores.store import Store


def open_store(run: str | os.PathLike[str] | Store, argument: str) -> Store:
    """Return the store of a run.

    Args:
        run: Its folder, or the store itself.
        argument: What it is called where the user has passed it.

    Raises:
        FileNotFoundError: If there is no run at the path.
        ValueError: If it is something else.
    """
    if isinstance(run, Store):
        return run
    if not isinstance(run, str | os.PathLike):
        raise ValueError(
            f"`{argument}` is a `{type(run).__name__}`; expected the folder of a recorded run, or "
            "its store. Only `attribute` asks several, `attribute([run, ...], [model, ...], "
            "queries)`."
        )
    return HDF5Store.open(Path(run))


def open_store_at(run: str | os.PathLike[str] | Store, argument: str, at: int) -> Store:
    """Return the store of a run that has a step at a place.

    Args:
        run: Its folder, or the store itself.
        argument: What it is called where the user has passed it.
        at: Place of the step; negative ones count from the end.

    Raises:
        FileNotFoundError: If there is no run at the path.
        ValueError: If it is something else, or has no such step.
    """
    store = open_store(run, argument)
    steps = len(store)
    if not isinstance(at, Integral) or not -steps <= at < steps:
        raise ValueError(
            f"`at` is {at!r}, and `{argument}` has {steps} steps; expected the place of one of "
            "them, such as -1 for the last."
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
        raise ValueError(
            f"The run {_name(run)} has no step yet; expected at least one. If its training is "
            "still going, wait for its first segment; otherwise train again."
        )
    return store


def _name(run: Run) -> str:
    return f"in this `{type(run).__name__}`" if isinstance(run, Store) else f"at `{run}`"
