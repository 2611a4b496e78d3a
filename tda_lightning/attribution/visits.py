"""Visits: select and rescale the visits of a run's steps."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tda_lightning.stores import Store
from tda_lightning.stores.step import OPTIONAL_FACTS, Step


def unweighted(step: Step) -> Step:
    """Return the step with each visit at weight 1: its row is the gradient of its sample's loss."""
    rows = step.sketch / step.weights.clamp_min(1e-30)[:, None]
    return replace(step, sketch=rows, weights=torch.ones_like(step.weights))


def last_visits(run: Store) -> Iterator[Step]:
    """Yield the steps, last to first, each with only the visits that are their sample's last.

    A sample that occurs several times in its last step keeps all of these visits.
    """
    seen: set[int] = set()
    for step in reversed(run):
        ids = step.sample_ids.tolist()
        yield select_visits(step, torch.tensor([i not in seen for i in ids], dtype=torch.bool))
        seen.update(ids)


def last_gradients(run: Store, train_ids: Int[Tensor, " n_train"]) -> Float[Tensor, "n_train k"]:
    """Return each training sample's gradient at its last visit; zero if it was never drawn."""
    gradients = torch.zeros(0)
    for step in map(unweighted, last_visits(run)):
        if not len(gradients):
            gradients = step.sketch.new_zeros(len(train_ids), step.sketch.shape[1])
        positions = torch.searchsorted(train_ids, step.sample_ids)
        gradients[positions.to(gradients.device)] = step.sketch
    return gradients


def last_epoch(run: Store) -> Store:
    """Return the steps of the last recorded epoch."""
    epoch = run.facts[-1].epoch
    backwards = range(len(run) - 1, -1, -1)
    return run[next((at for at in backwards if run.facts[at].epoch != epoch), -1) + 1 :]


def select_visits(step: Step, mask: Bool[Tensor, " n"]) -> Step:
    """Return the step with the visits that a mask on the CPU selects."""
    device_mask = mask.to(step.sketch.device)
    known = {name: fact for name in OPTIONAL_FACTS if (fact := getattr(step, name)) is not None}
    return replace(
        step,
        sample_ids=step.sample_ids[mask],
        weights=step.weights[device_mask],
        sketch=step.sketch[device_mask],
        **{name: fact[device_mask] for name, fact in known.items()},
    )
