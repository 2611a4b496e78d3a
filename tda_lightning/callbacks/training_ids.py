"""Ids of the training set of a run, which grows if the trainer reloads its data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from jaxtyping import Int
from pytorch_lightning.utilities import rank_zero_warn

from tda_lightning.callbacks.lightning_trainer import Trainer, training_loaders
from tda_lightning.passes.batch_contents import batch_size
from tda_lightning.recording.sample_ids import SampleLedger
from tda_lightning.stores.recipe import Recipe, ids_of, ranges_of


def known_ids(
    trainer: Trainer, ledger: SampleLedger, continued: Recipe | None
) -> tuple[tuple[int, int], ...] | None:
    """Return the ids of the training set as ranges, or ``None`` if only batches hold them.

    Args:
        trainer: The trainer.
        ledger: Infers the ids of its current loader.
        continued: Recipe of the run that this training continues. Its ids stay if the trainer
            reloads its data; :func:`with_new_ids` adds those of the current loader.
    """
    if continued is not None and _reloads_data(trainer):
        return continued.train_ids
    ids = ledger.train_ids
    return None if ids is None else ranges_of(ids)


def with_new_ids(trainer: Trainer, ledger: SampleLedger, recipe: Recipe) -> Recipe:
    """Return the recipe with the ids of the current loader, such as a new split of the data."""
    if not _reloads_data(trainer):
        return recipe
    ids = _merged(recipe.train_ids, ledger.train_ids)
    return recipe if ids == recipe.train_ids else replace(recipe, train_ids=ids)


def warn_of_one_sample(ledger: SampleLedger) -> None:
    """Warn if the training data are one sample, such as a graph whose nodes are the samples."""
    ids = ledger.train_ids
    if ids is not None and len(ids) == 1:
        rank_zero_warn(
            "GradientRecorder: the training data are a single sample; expected several, among "
            "which scores choose. If the rows of this sample are meant, as with the nodes of a "
            "graph, load them as samples: in a graph, each node with its neighbourhood."
        )


def warn_of_other_loaders(name: str, trainer: Trainer, batch: Any, n_ids: int) -> None:
    """Warn if there are fewer ids than samples of all loaders in a batch."""
    if len(training_loaders(trainer)) < 2:
        return
    parts = list(batch.values()) if isinstance(batch, Mapping) else list(batch)
    try:
        n_samples = sum(batch_size(part, "batch") for part in parts if part is not None)
    except ValueError:  # Such as samples of different sizes.
        return
    if n_ids < n_samples:
        rank_zero_warn(
            f"{name}: `sample_ids` returned {n_ids} ids for a batch of {n_samples} "
            "samples from several loaders; expected one id per sample. A row may hold a sample of "
            "each loader, with the id of one. Return all ids, and pass all samples through the "
            "model in one call: see `Several loaders` in docs/gotchas.md."
        )


def _reloads_data(trainer: Trainer) -> bool:
    return bool(getattr(trainer, "reload_dataloaders_every_n_epochs", 0))


def _merged(
    ranges: tuple[tuple[int, int], ...] | None, ids: Int[np.ndarray, " n"] | None
) -> tuple[tuple[int, int], ...] | None:
    """Return the ranges with more ids in them, or ``None`` if either are unknown.

    >>> _merged(((0, 3), (7, 8)), np.array([2, 3, 9]))
    ((0, 4), (7, 8), (9, 10))
    """
    if ranges is None or ids is None:
        return None
    return ranges_of(np.union1d(ids_of(ranges).numpy(), ids))
