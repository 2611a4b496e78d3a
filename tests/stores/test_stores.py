"""Stores: the contract, and what a folder on disk must survive besides."""

import json
import os
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import h5py
import numpy as np
import pytest
import torch

from tda_lightning import GradientRecorder, HDF5Store
from tda_lightning.stores import MemoryStore
from tda_lightning.stores.contract import (
    RECIPE,
    StoreContract,
    filled,
    make_steps,
    same,
    same_facts,
)
from tda_lightning.stores.hdf5 import OpenSegment, Segment, segment_reader, segment_writer
from tda_lightning.stores.hdf5.stored_rows import StoredRows, stamp_of


class TestMemoryStore(StoreContract):
    def make(self, folder):
        return MemoryStore()


class TestHDF5Store(StoreContract):
    def make(self, folder):
        return HDF5Store(folder / "run")


class TestSmallBlocks(StoreContract):
    """The same, when a block holds a single step."""

    @pytest.fixture(autouse=True)
    def _one_step_per_block(self, monkeypatch):
        monkeypatch.setattr(segment_reader, "_BLOCK_BYTES", 1)

    def make(self, folder):
        return HDF5Store(folder / "run", segment_bytes=1)


def test_a_run_is_readable_while_it_is_recorded(tmp_path):
    store, steps = HDF5Store(tmp_path / "run"), make_steps(5)
    store.begin(RECIPE)
    assert len(HDF5Store.open(tmp_path / "run")) == 0
    for step in steps[:3]:
        store.append(step)
    store.seal()
    store.append(steps[3])
    assert len(HDF5Store.open(tmp_path / "run")) == 3
    store.seal()
    assert all(map(same, HDF5Store.open(tmp_path / "run"), steps))


def written(path, count):
    """Return how many steps are on disk, once there are ``count`` or after five seconds."""
    deadline = time.monotonic() + 5
    while len(HDF5Store.open(path)) < count and time.monotonic() < deadline:
        time.sleep(0.01)
    return len(HDF5Store.open(path))


def test_steps_are_written_in_the_background_when_they_are_large(tmp_path):
    store = HDF5Store(tmp_path / "run", segment_bytes=15 * 2 * 4)  # Room for four visits.
    store.begin(RECIPE)
    one, two, three, four = make_steps(4)
    store.append(one)
    store.append(two)
    store.append(three)
    assert written(tmp_path / "run", 2) == 2
    store.append(four)
    assert written(tmp_path / "run", 4) == 4
    assert all(map(same, HDF5Store.open(tmp_path / "run"), [one, two, three, four]))


def test_steps_are_written_in_the_background_when_they_are_old(tmp_path):
    store = HDF5Store(tmp_path / "run", segment_seconds=0.0)
    store.begin(RECIPE)
    for count, step in enumerate(make_steps(3)):
        store.append(step)
        assert written(tmp_path / "run", count + 1) == count + 1


def test_an_error_while_writing_is_raised_and_not_lost(tmp_path):
    store = filled(HDF5Store(tmp_path / "run"), make_steps(2))
    shutil.rmtree(tmp_path / "run")
    store.append(make_steps(3)[2])
    with pytest.raises(FileNotFoundError):
        store.seal()


@pytest.mark.parametrize("rank", [0, 1])
def test_a_step_of_which_one_process_has_lost_its_part_is_left_out(tmp_path, rank):
    stores, steps = [HDF5Store(tmp_path / "run") for _ in range(2)], make_steps(4)
    for number, store in enumerate(stores):
        store.join(number, 2)
    stores[0].begin(replace(RECIPE, ranks=2))
    stores[1].resume(0)
    for step in steps:
        for store in stores:
            store.append(step)
            store.seal()
    assert [step.index for step in HDF5Store.open(tmp_path / "run")] == [0, 2, 4, 6]
    (tmp_path / "run" / f"segment-000001-rank-{rank}.h5").unlink()
    left = HDF5Store.open(tmp_path / "run")
    assert [step.index for step in left] == [0, 4, 6]
    for step, own in zip(left, (steps[0], *steps[2:]), strict=True):
        assert step.sample_ids.tolist() == 2 * own.sample_ids.tolist()
    found = [(one.index, one.epoch, one.sample_ids.tolist()) for one in left.facts]
    assert found == [(step.index, step.epoch, step.sample_ids.tolist()) for step in left]


def test_half_written_segments_are_invisible(tmp_path, monkeypatch):
    store = filled(HDF5Store(tmp_path / "run"), make_steps(4))

    def die(path):
        raise KeyboardInterrupt

    monkeypatch.setattr(segment_writer, "make_durable", die)
    store.append(make_steps(5)[4])
    with pytest.raises(KeyboardInterrupt):
        store.seal()
    assert list((tmp_path / "run").glob(".*.partial"))
    assert len(HDF5Store.open(tmp_path / "run")) == 4


def test_a_killed_beginning_can_be_begun_again(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".recipe.json.partial").write_text("{")
    assert len(filled(HDF5Store(tmp_path / "run"), make_steps(2))) == 2


def test_blocks_cover_every_step_once():
    offset = [0, 3, 4, 9, 9, 11]
    for visits in (1, 4, 5, 100):
        blocks = segment_reader.split(offset, visits)
        assert [p for block in blocks for p in block] == [0, 1, 2, 3, 4]
        assert all(len(b) == 1 or offset[b.stop] - offset[b.start] <= visits for b in blocks)


def test_a_stranger_can_read_the_file_with_bare_h5py(tmp_path):
    steps = make_steps(3)
    filled(HDF5Store(tmp_path / "run"), steps)
    recipe = json.loads((tmp_path / "run" / "recipe.json").read_text())
    assert recipe["format"] == "tda_lightning"
    with h5py.File(tmp_path / "run" / "segment-000000.h5") as file:
        first, last = file["steps/offset"][1:3]
        bits = file["visits/sketch"][first:last].view("uint16").astype("uint32")
        assert (bits << 16).view("float32").tolist() == steps[1].sketch.tolist()
        assert file["steps/lr"][1, 0] == steps[1].lr


def test_segments_of_older_versions_tell_less_of_their_groups(tmp_path):
    steps = make_steps(3, groups=2)
    filled(HDF5Store(tmp_path / "run"), steps)
    for path in (tmp_path / "run").glob("segment-*.h5"):
        with h5py.File(path, "r+") as file:
            for name in ("share", "decoupled", "descent", "owner"):
                del file["steps"][name]
    for found, step in zip(HDF5Store.open(tmp_path / "run"), steps, strict=True):
        assert found.groups == tuple(replace(group, share=0.0, owner=0.0) for group in step.groups)


def test_several_threads_can_read_one_store(tmp_path, monkeypatch):
    monkeypatch.setattr(segment_reader, "_BLOCK_BYTES", 90)
    steps = make_steps(12)
    store = filled(HDF5Store(tmp_path / "run"), steps)

    def read(seed):
        order = torch.randperm(12, generator=torch.Generator().manual_seed(seed)).tolist() * 20
        return all(same(store[position], steps[position]) for position in order)

    with ThreadPoolExecutor(4) as threads:
        assert all(threads.map(read, range(4)))


def test_segments_that_somebody_compressed_are_read_as_before(tmp_path):
    steps = [replace(step, curvature_rows=2 * step.sketch) for step in make_steps(5)]
    filled(HDF5Store(tmp_path / "run"), steps)
    for path in (tmp_path / "run").glob("segment-*.h5"):
        with h5py.File(path, "r+") as file:
            for group in ("visits", "curvature"):
                rows = file[group]["sketch"][:]
                del file[group]["sketch"]
                file[group].create_dataset("sketch", data=rows, compression="gzip")
    assert all(map(same, HDF5Store.open(tmp_path / "run"), steps))


def test_a_segment_that_is_cut_off_while_it_is_read_is_said(tmp_path):
    filled(HDF5Store(tmp_path / "run"), make_steps(2))
    path = tmp_path / "run" / "segment-000000.h5"
    with h5py.File(path) as file:
        rows = StoredRows.of(path, file["visits"], stamp_of(path))
    assert rows.read(slice(0, 3), np.ones(3)).shape == (3, 15)
    os.truncate(path, rows.offset + 2 * rows.row_bytes)
    with pytest.raises(OSError, match=r"segment-000000.h5` has changed since the run was opened"):
        rows.read(slice(0, 2), np.ones(2))


@pytest.mark.parametrize("storage", ["bfloat16", "as computed"])
def test_a_run_that_was_resumed_meanwhile_is_to_be_opened_again(tmp_path, storage):
    """What is in the place of an old segment has its rows elsewhere."""
    store, steps = HDF5Store(tmp_path / "run", storage=storage), make_steps(6)
    store.begin(RECIPE)
    for step in steps:
        store.append(step)
    store.seal()
    late = HDF5Store.open(tmp_path / "run")
    HDF5Store(tmp_path / "run", storage=storage).resume(steps[4].index)
    again = HDF5Store.open(tmp_path / "run")
    assert all(map(same, again, steps[:4]))
    assert len(again) == 4
    with pytest.raises(OSError, match=r"has changed since the run was opened.*open the run again"):
        late.read(1)
    with pytest.raises(OSError, match="has changed since the run was opened"):
        late.facts_at(1)


def test_facts_are_known_without_reading_rows(tmp_path, monkeypatch):
    steps = make_steps(2)
    filled(HDF5Store(tmp_path / "run"), steps)
    segment = OpenSegment(Segment(tmp_path / "run" / "segment-000000.h5"))
    monkeypatch.delattr(StoredRows, "read")
    assert all(same_facts(segment.facts_at(place), step) for place, step in enumerate(steps))
    with pytest.raises(AttributeError):
        segment.step_at(0)


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (lambda path: path.write_text("mine"), "found a file"),
        (lambda path: path.mkdir(), "found an empty folder"),
        (lambda path: (path.mkdir(), (path / "thesis.tex").touch()), "a folder with `thesis.tex`"),
    ],
    ids=["a file", "empty", "a thesis"],
)
def test_something_else_is_not_read_as_a_run(tmp_path, prepare, message):
    prepare(tmp_path / "run")
    with pytest.raises(ValueError, match=message):
        HDF5Store.open(tmp_path / "run")


def test_what_is_not_there_is_not_opened(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such folder"):
        HDF5Store.open(tmp_path / "run")


def test_another_format_is_refused(tmp_path):
    filled(HDF5Store(tmp_path / "run"), make_steps(1))
    file = tmp_path / "run" / "recipe.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "version": 99}))
    with pytest.raises(ValueError, match=r"version 99; expected .* Read it with"):
        HDF5Store.open(tmp_path / "run")


@pytest.mark.parametrize("existing", ["refuse", "replace"])
def test_a_folder_of_something_else_is_never_written_or_cleared(tmp_path, existing):
    from lightning_models import Plain, loader, mlp, quiet_trainer, vectors

    (tmp_path / "thesis.tex").write_text("all of it")
    trainer = quiet_trainer(GradientRecorder(tmp_path, existing=existing))
    with pytest.raises(FileExistsError, match="something else than a recorded run"):
        trainer.fit(Plain(mlp()), loader(vectors()))
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [
        ("thesis.tex", "all of it")
    ]


def test_an_existing_run_is_kept_or_replaced_as_told(tmp_path):
    from lightning_models import Plain, loader, mlp, quiet_trainer, vectors

    def train(**settings):
        recorder = GradientRecorder(tmp_path / "run", **settings)
        quiet_trainer(recorder, max_epochs=1).fit(Plain(mlp()), loader(vectors()))
        return HDF5Store.open(tmp_path / "run")

    first = train()
    with pytest.raises(FileExistsError, match=r"holds a recorded run already.*existing='replace'"):
        train()
    assert all(map(same, HDF5Store.open(tmp_path / "run"), first))
    assert len(train(existing="replace")) == len(first)


def test_doubles_are_kept_as_doubles(tmp_path):
    step = make_steps(1)[0]
    doubles = [replace(step, sketch=step.sketch.double() / 3)]
    store = filled(HDF5Store(tmp_path / "run", storage="as computed"), doubles)
    assert store[0].sketch.dtype == torch.float64


@pytest.mark.parametrize(
    ("storage", "error"), [("float16", 5e-4), ("bfloat16", 4e-3), ("int8", 5e-3)]
)
def test_rows_of_any_size_survive_being_rounded(tmp_path, storage, error):
    """From the smallest normal float32 to the largest, in one store; none vanishes."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(11, 15, generator=generator) * torch.logspace(-37, 37, 11)[:, None] / 4
    rows[5] = 0
    step = replace(make_steps(11)[10], sketch=rows)
    store = filled(HDF5Store(tmp_path / "run", storage=storage), [step])
    found = store[0].sketch
    assert found.dtype == torch.float32
    assert torch.equal(found[5], torch.zeros(15))
    relative = (found - rows).abs().amax(dim=1) / rows.abs().amax(dim=1).clamp_min(1e-45)
    assert relative.max() < error


@pytest.mark.parametrize("storage", ["as computed", "float16", "bfloat16", "int8"])
def test_not_even_the_smallest_rows_vanish_and_broken_ones_stay_broken(tmp_path, storage):
    step = make_steps(2)[1]
    rows = torch.stack([torch.full((15,), 2e-38), torch.full((15,), torch.nan)])
    store = filled(HDF5Store(tmp_path / "run", storage=storage), [replace(step, sketch=rows)])
    torch.testing.assert_close(store[0].sketch[0], rows[0], rtol=1e-2, atol=0)
    assert torch.isnan(store[0].sketch[1]).all()


def test_fewer_bytes_are_fewer_bytes(tmp_path):
    step = make_steps(1)[0]
    wide = replace(
        step,
        sample_ids=torch.arange(100),
        weights=torch.ones(100),
        sketch=torch.randn(100, 1000),
    )
    sizes = [
        filled(HDF5Store(tmp_path / name, storage=name), [wide]).size_on_disk
        for name in ("as computed", "float16", "int8")
    ]
    assert sizes[0] > 1.8 * sizes[1] > 3.2 * sizes[2]
