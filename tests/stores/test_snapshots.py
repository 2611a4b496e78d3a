"""Snapshots: which steps and which part of a run they belong to."""

from dataclasses import replace

import pytest
import torch

from tda_lightning.stores import MemoryStore
from tda_lightning.stores.contract import filled, make_steps
from tda_lightning.stores.snapshots import later_snapshots, position_of

INDICES = list(range(0, 303, 3))


class CountedFacts(MemoryStore):
    """Counts the steps whose facts are read."""

    n_read = 0

    def facts_at(self, position):
        self.n_read += 1
        return super().facts_at(position)


@pytest.fixture
def store():
    steps = make_steps(len(INDICES))
    steps = [replace(step, index=index) for step, index in zip(steps, INDICES, strict=True)]
    store = filled(CountedFacts(), steps)
    for snapshot in (0, 120, 240):
        store.keep_weights(snapshot, {"w": torch.zeros(1)})
    return store


@pytest.mark.parametrize("snapshot", [-2, 0, 1, 2, 3, 151, 152, 300, 301, 307])
def test_the_position_of_a_snapshot_is_that_of_the_nearest_step(store, snapshot):
    distances = [abs(index - snapshot) for index in INDICES]
    assert position_of(store, snapshot) == distances.index(min(distances))


def test_snapshots_are_placed_without_reading_every_step(store):
    store.n_read = 0
    assert later_snapshots(store) == [120, 240]
    assert position_of(store, 240) == 80
    assert store.n_read < len(INDICES) // 4
