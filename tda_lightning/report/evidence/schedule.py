"""Schedule: the course of the training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from tda_lightning.passes.losses import sample_losses
from tda_lightning.passes.model_state import swapped_weights
from tda_lightning.passes.query_batches import batches_of
from tda_lightning.stores import Store
from tda_lightning.stores.snapshots import spread

# The queries are evaluated at this many snapshots.
MAX_SNAPSHOTS = 8


@dataclass(frozen=True)
class Schedule:
    """The course of the training.

    Attributes:
        steps: Index of each recorded step.
        rates: Largest learning rate of each step.
        gradients: Norm of the sum of each step's rows.
        losses: Mean loss of the queries at some snapshots, by the index of the step after each;
            empty if the run has none.
    """

    steps: list[int]
    rates: list[float]
    gradients: list[float]
    losses: dict[int, float]


def schedule(store: Store, model: nn.Module, queries: Any) -> Schedule:
    """Read the course of a training, and evaluate the queries at its snapshots."""
    steps, rates, gradients = [], [], []
    for step in store:
        steps.append(step.index)
        rates.append(step.lr)
        gradients.append(float(step.sketch.double().sum(dim=0).norm()))
    return Schedule(steps, rates, gradients, _losses_at_snapshots(store, model, queries))


def _losses_at_snapshots(store: Store, model: nn.Module, queries: Any) -> dict[int, float]:
    losses = {}
    for snapshot in spread(store.snapshots(), MAX_SNAPSHOTS):
        with swapped_weights(model, store.weights_at(snapshot)):
            parts = [sample_losses(model, b, progress=False).values for b in batches_of(queries)]
        losses[snapshot] = float(torch.cat(parts).double().mean())
    return losses
