"""The front door: ask a recorded run."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from torch import nn

from tda_lightning.attribution import Attributor, SelfAttributor, TracIn
from tda_lightning.queries import record_queries
from tda_lightning.scores import SampleScores, Scores
from tda_lightning.stores import HDF5Store, Store


def attribute(
    run: str | Path | Store,
    model: nn.Module,
    queries: Any,
    *,
    method: Attributor = TracIn(),
    mode: Literal["eval", "train"] = "eval",
    progress: bool = True,
) -> Scores:
    """Say which training samples lowered, or raised, the loss of each query.

    Args:
        run: A recorded training: its folder or a store. A slice of a store asks about its steps.
        model: The LightningModule that was trained, with the weights to ask about.
        queries: A batch as the training loader yields them, or a ``DataLoader`` of such batches.
        method: How to attribute.
        mode: Whether the model acts as in evaluation or as in training while queries pass through.
        progress: Show progress bars.

    Returns:
        Scores, shape ``(n_query, n_train)``; positive marks a proponent.

    Raises:
        FileNotFoundError: If there is no run at the path.
        ValueError: If the run is empty, the model is another one, or the queries do not fit it.
    """
    store = open_run(run)
    rows = record_queries(model, queries, like=store, mode=mode, progress=progress)
    return method.attribute(store, rows, progress=progress)


def self_influence(
    run: str | Path | Store, *, method: SelfAttributor = TracIn(), progress: bool = True
) -> SampleScores:
    """Say how much each training sample did for itself: high for unusual and mislabelled samples.

    Args:
        run: A recorded training: its folder or a store.
        method: How to attribute.
        progress: Show a progress bar.

    Returns:
        Scores, shape ``(n_train,)``.

    Raises:
        FileNotFoundError: If there is no run at the path.
        ValueError: If the run is empty.
    """
    return method.self_influence(open_run(run), progress=progress)


def open_run(run: str | Path | Store) -> Store:
    """Return the store of a run that holds at least one step.

    Raises:
        FileNotFoundError: If there is no run at the path.
        ValueError: If the run is empty.
    """
    store = run if isinstance(run, Store) else HDF5Store.open(run)
    if len(store) == 0:
        raise ValueError(
            f"The run {_name(run)} has no step yet; expected at least one. If its training is "
            "still going, wait for its first segment; otherwise train again."
        )
    return store


def _name(run: str | Path | Store) -> str:
    return f"in this `{type(run).__name__}`" if isinstance(run, Store) else f"at `{run}`"
