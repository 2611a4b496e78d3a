"""Visits: which of a sample's visits a method looks at, and how."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from jaxtyping import Bool
from torch import Tensor

from tda_lightning.stores import Store
from tda_lightning.stores.step import Step


def as_own_gradients(step: Step) -> Step:
    """Return the step with rows that are the gradients of the visits' own losses, at weight 1."""
    rows = step.sketch / step.weights.clamp_min(1e-30)[:, None]
    return replace(step, sketch=rows, weights=torch.ones_like(step.weights))


def last_visits(run: Store) -> Iterator[Step]:
    """Yield steps, last to first, with only those visits that are their samples' last.

    A sample that comes several times in its last step keeps all of these visits.
    """
    seen: set[int] = set()
    for step in reversed(run):
        ids = step.sample_ids.tolist()
        yield only(step, torch.tensor([i not in seen for i in ids], dtype=torch.bool))
        seen.update(ids)


def last_epoch(run: Store) -> Store:
    """Return the steps of the last epoch that was recorded."""
    epoch = run.facts[-1].epoch
    backwards = range(len(run) - 1, -1, -1)
    return run[next((at for at in backwards if run.facts[at].epoch != epoch), -1) + 1 :]


def only(step: Step, chosen: Bool[Tensor, " n"]) -> Step:
    """Return the step with some of its visits."""
    there = chosen.to(step.sketch.device)
    return replace(
        step,
        sample_ids=step.sample_ids[chosen],
        weights=step.weights[there],
        sketch=step.sketch[there],
        terms=None if step.terms is None else step.terms[there],
        curvature=None if step.curvature is None else step.curvature[there],
    )
