"""Runs of many small segments: each is opened once, and only facts of visits stay in memory."""

import weakref
from collections import Counter
from dataclasses import replace

import pytest
import torch

from tda_lightning import HDF5Store
from tda_lightning.attribution import Averaged
from tda_lightning.stores.contract import RECIPE, filled, make_steps, same, same_facts
from tda_lightning.stores.hdf5 import segment_reader, shards
from tda_lightning.stores.step import Preconditioner

N_STEPS = 10
COORDINATES = Preconditioner(torch.ones(15), torch.ones(15))


@pytest.fixture(params=[1, 2], ids=["one process", "two processes"])
def run(request, tmp_path):
    """The folder of a run with two steps in each segment."""
    ranks = request.param
    first, *others = make_steps(N_STEPS)
    steps = [replace(first, preconditioner=COORDINATES), *others]  # Found from the last step.
    stores = [HDF5Store(tmp_path / "run") for _ in range(ranks)]
    for rank, store in enumerate(stores):
        store.join(rank, ranks)
        if rank == 0:
            store.begin(replace(RECIPE, ranks=ranks, train_ids=((0, 2 * N_STEPS),)))
        else:
            store.resume(0)
        for number, step in enumerate(steps):
            store.append(step)
            if number % 2:
                store.seal()
    return tmp_path / "run"


@pytest.fixture
def opened(monkeypatch):
    """How often each file has been opened as HDF5."""
    counts, original = Counter(), segment_reader.open_hdf5

    def open_hdf5(path):
        counts[path.name] += 1
        return original(path)

    monkeypatch.setattr(segment_reader, "open_hdf5", open_hdf5)
    return counts


def test_a_segment_is_opened_with_the_run_and_once_for_all_its_steps(run, opened):
    store = HDF5Store.open(run)
    assert set(opened.values()) == {1}
    facts = list(store.facts)
    for steps, expected in ((store, facts), (reversed(store), reversed(facts))):
        assert all(map(same_facts, steps, expected))
    assert store.preconditioner() is not None
    assert store.audits() == []
    assert store.visited_ids().tolist() == list(range(2 * N_STEPS - 1))
    assert len(opened) == len(list(run.glob("segment-*.h5")))
    assert set(opened.values()) == {2}


def test_questions_open_each_segment_once(run, opened):
    store = HDF5Store.open(run)
    for method in Averaged().methods:  # With several passes each.
        method.attribute(store, torch.eye(15)[:3], progress=False)
    assert set(opened.values()) == {2}


def test_steps_are_the_same_whatever_stays_in_memory(tmp_path, monkeypatch, opened):
    steps = make_steps(N_STEPS)
    filled(HDF5Store(tmp_path / "run"), steps).release()
    opened.clear()
    one = HDF5Store.open(tmp_path / "run")
    assert all(map(same, one, steps))
    size = max(segment._visits.n_bytes for segment in one._shard.segments)
    for room, n_kept in ((0, 0), (size, 1), (3.5 * size, 3)):
        opened.clear()
        monkeypatch.setattr(shards, "_MAX_VISIT_BYTES", int(room))
        store = HDF5Store.open(tmp_path / "run")
        for _ in range(3):
            assert all(map(same, store, steps))
        assert store.preconditioner() is None  # Facts of steps always stay.
        assert list(opened.values()) == [2] * n_kept + [4] * (N_STEPS // 2 - n_kept)


def test_rows_leave_memory_with_their_segment(run):
    store = HDF5Store.open(run)
    rows = weakref.ref(store._shard.read(0).sketch)
    assert rows() is not None
    store.read(N_STEPS - 1)
    assert rows() is None
