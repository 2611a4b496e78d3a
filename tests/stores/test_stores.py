"""Stores: the public contract, and HDF5 folders under crashes, threads and several processes."""

import errno
import json
import os
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

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
from tda_lightning.stores.hdf5 import Segment, segment_datasets
from tda_lightning.stores.hdf5.segment_file import HEADER_BYTES
from tda_lightning.stores.hdf5.stored_rows import StoredRows, stamp_of
from tda_lightning.stores.integrity import durable
from tda_lightning.stores.integrity.damage import StoreFileError


class TestMemoryStore(StoreContract):
    def make(self, folder):
        return MemoryStore()


class TestHDF5Store(StoreContract):
    def make(self, folder):
        return HDF5Store(folder / "run")


class TestSmallBlocks(StoreContract):
    """The contract with blocks of a single step."""

    @pytest.fixture(autouse=True)
    def _one_step_per_block(self, monkeypatch):
        monkeypatch.setattr(segment_datasets, "_BLOCK_BYTES", 1)

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


class LosingStore(MemoryStore):
    """A store that raises an IndexError for one step, such as a database that loses a row."""

    has_lost = False

    def read(self, position):
        if self.has_lost and position == 2:
            raise IndexError
        return super().read(position)


@pytest.mark.parametrize("view", ["steps", "facts", "slice", "reversed"])
def test_an_index_error_while_reading_does_not_end_the_run_early(view):
    run = filled(LosingStore(), make_steps(5))
    iterable = {"steps": run, "facts": run.facts, "slice": run[1:], "reversed": reversed(run)}[view]
    run.has_lost = True
    with pytest.raises(IndexError):
        list(iterable)


def test_a_damaged_offset_does_not_end_the_run_early(tmp_path):
    filled(HDF5Store(tmp_path / "run"), make_steps(6))
    with h5py.File(tmp_path / "run" / "segment-000001.h5", "r+") as file:
        file["steps/offset"][1] = 2**40
    with pytest.raises((IndexError, OSError)):
        list(HDF5Store.open(tmp_path / "run"))


def steps_on_disk(path, count):
    """Return the number of steps on disk once it is ``count``, or after a minute."""
    deadline = time.monotonic() + 60
    while len(HDF5Store.open(path)) < count and time.monotonic() < deadline:
        time.sleep(0.01)
    return len(HDF5Store.open(path))


def test_a_full_buffer_is_written_in_the_background(tmp_path):
    store = HDF5Store(tmp_path / "run", segment_bytes=15 * 2 * 4)  # Room for four visits.
    store.begin(RECIPE)
    steps = make_steps(4)
    store.append(steps[0])
    store.append(steps[1])
    store.append(steps[2])
    assert steps_on_disk(tmp_path / "run", 2) == 2
    store.append(steps[3])
    assert steps_on_disk(tmp_path / "run", 4) == 4
    assert all(map(same, HDF5Store.open(tmp_path / "run"), steps))


def test_old_steps_are_written_in_the_background(tmp_path):
    store = HDF5Store(tmp_path / "run", segment_seconds=0.0)
    store.begin(RECIPE)
    for count, step in enumerate(make_steps(3)):
        store.append(step)
        assert steps_on_disk(tmp_path / "run", count + 1) == count + 1


def test_an_error_in_the_background_is_raised_by_seal(tmp_path):
    store = filled(HDF5Store(tmp_path / "run"), make_steps(2))
    shutil.rmtree(tmp_path / "run")
    store.append(make_steps(3)[2])
    with pytest.raises(FileNotFoundError):
        store.seal()


@pytest.mark.parametrize("rank", [0, 1])
def test_a_step_is_left_out_if_one_process_lost_its_part(tmp_path, rank):
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
    merged = HDF5Store.open(tmp_path / "run", missing="skip")
    assert [step.index for step in merged] == [0, 4, 6]
    for step, part in zip(merged, (steps[0], *steps[2:]), strict=True):
        assert step.sample_ids.tolist() == 2 * part.sample_ids.tolist()
    facts = [(step.index, step.epoch, step.sample_ids.tolist()) for step in merged.facts]
    assert facts == [(step.index, step.epoch, step.sample_ids.tolist()) for step in merged]


def test_partial_segments_are_ignored(tmp_path, monkeypatch):
    store = filled(HDF5Store(tmp_path / "run"), make_steps(4))

    def die(path):
        raise KeyboardInterrupt

    monkeypatch.setattr(durable, "make_durable", die)
    # A process that is killed deletes nothing.
    monkeypatch.setattr(Path, "unlink", lambda path, missing_ok=False: None)
    store.append(make_steps(5)[4])
    with pytest.raises(KeyboardInterrupt):
        store.seal()
    assert list((tmp_path / "run").glob(".*.partial"))
    assert len(HDF5Store.open(tmp_path / "run")) == 4


def test_a_run_can_begin_after_a_kill_during_begin(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".recipe.json.partial").write_text("{")
    assert len(filled(HDF5Store(tmp_path / "run"), make_steps(2))) == 2


def test_blocks_cover_every_step_once():
    offset = [0, 3, 4, 9, 9, 11]
    for visits in (1, 4, 5, 100):
        blocks = segment_datasets.split(offset, visits)
        assert [p for block in blocks for p in block] == [0, 1, 2, 3, 4]
        assert all(len(b) == 1 or offset[b.stop] - offset[b.start] <= visits for b in blocks)


def test_segments_can_be_read_with_h5py_alone(tmp_path):
    steps = make_steps(3)
    filled(HDF5Store(tmp_path / "run"), steps)
    recipe = json.loads((tmp_path / "run" / "recipe.json").read_text())
    assert recipe["format"] == "tda_lightning"
    with h5py.File(tmp_path / "run" / "segment-000000.h5") as file:
        first, last = file["steps/offset"][1:3]
        bits = file["visits/sketch"][first:last].view("uint16").astype("uint32")
        assert (bits << 16).view("float32").tolist() == steps[1].sketch.tolist()
        assert file["steps/lr"][1, 0] == steps[1].lr


def without_header(path):
    """Turn a segment into one of an older version, which had no header."""
    path.write_bytes(path.read_bytes()[HEADER_BYTES:])


def test_segments_of_older_versions_may_lack_columns_of_groups(tmp_path):
    steps = make_steps(3, groups=2)
    filled(HDF5Store(tmp_path / "run"), steps)
    for path in (tmp_path / "run").glob("segment-*.h5"):
        without_header(path)
        with h5py.File(path, "r+") as file:
            for name in ("share", "decoupled", "descent", "owner"):
                del file["steps"][name]
    for stored, step in zip(HDF5Store.open(tmp_path / "run"), steps, strict=True):
        expected = tuple(replace(group, share=0.0, owner=0.0) for group in step.groups)
        assert stored.groups == expected


def test_several_threads_can_read_one_store(tmp_path, monkeypatch):
    monkeypatch.setattr(segment_datasets, "_BLOCK_BYTES", 90)
    steps = make_steps(12)
    store = filled(HDF5Store(tmp_path / "run"), steps)

    def read(seed):
        order = torch.randperm(12, generator=torch.Generator().manual_seed(seed)).tolist() * 20
        return all(same(store[position], steps[position]) for position in order)

    with ThreadPoolExecutor(4) as threads:
        assert all(threads.map(read, range(4)))


def test_segments_compressed_by_a_user_are_read_correctly(tmp_path):
    steps = [replace(step, curvature_rows=2 * step.sketch) for step in make_steps(5)]
    filled(HDF5Store(tmp_path / "run"), steps)
    for path in (tmp_path / "run").glob("segment-*.h5"):
        without_header(path)  # As h5repack leaves it.
        with h5py.File(path, "r+") as file:
            for group in ("visits", "curvature"):
                rows = file[group]["sketch"][:]
                del file[group]["sketch"]
                file[group].create_dataset("sketch", data=rows, compression="gzip")
    assert all(map(same, HDF5Store.open(tmp_path / "run"), steps))


def test_a_segment_truncated_while_it_is_read_raises_an_error(tmp_path):
    filled(HDF5Store(tmp_path / "run"), make_steps(2))
    path = tmp_path / "run" / "segment-000000.h5"
    with h5py.File(path) as file:
        rows = StoredRows.of(path, file["visits"], stamp_of(path))
    assert rows.read(slice(0, 3), np.ones(3), 0).shape == (3, 15)
    os.truncate(path, rows.offset + 2 * rows.row_bytes)
    with pytest.raises(OSError, match=r"segment-000000.h5` has changed since the run was opened"):
        rows.read(slice(0, 2), np.ones(2), 0)


@pytest.mark.parametrize("storage", ["bfloat16", "as computed"])
def test_reading_a_run_that_was_resumed_after_opening_raises_an_error(tmp_path, storage):
    """The segment that replaces the old one has its rows at other offsets."""
    store, steps = HDF5Store(tmp_path / "run", storage=storage), make_steps(6)
    store.begin(RECIPE)
    for step in steps:
        store.append(step)
    store.seal()
    outdated = HDF5Store.open(tmp_path / "run")
    HDF5Store(tmp_path / "run", storage=storage).resume(steps[4].index)
    reopened = HDF5Store.open(tmp_path / "run")
    assert all(map(same, reopened, steps[:4]))
    assert len(reopened) == 4
    with pytest.raises(OSError, match=r"has changed since the run was opened.*open the run again"):
        outdated.read(1)
    with pytest.raises(OSError, match="has changed since the run was opened"):
        outdated.facts_at(1)


def test_facts_are_read_without_rows(tmp_path, monkeypatch):
    steps = make_steps(2)
    filled(HDF5Store(tmp_path / "run"), steps)
    segment = Segment(tmp_path / "run" / "segment-000000.h5")
    monkeypatch.delattr(StoredRows, "read")
    assert all(same_facts(segment.facts_at(n), step) for n, step in enumerate(steps))
    with pytest.raises(OSError, match="no attribute 'read'"):
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
def test_opening_anything_but_a_run_raises_an_error(tmp_path, prepare, message):
    prepare(tmp_path / "run")
    with pytest.raises(ValueError, match=message):
        HDF5Store.open(tmp_path / "run")


def test_opening_a_missing_folder_raises_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such folder"):
        HDF5Store.open(tmp_path / "run")


def test_opening_another_format_raises_an_error(tmp_path):
    filled(HDF5Store(tmp_path / "run"), make_steps(1))
    file = tmp_path / "run" / "recipe.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "version": 99}))
    with pytest.raises(ValueError, match=r"version 99; expected .* Read it with"):
        HDF5Store.open(tmp_path / "run")


@pytest.mark.parametrize("existing", ["refuse", "replace"])
def test_a_folder_with_other_files_is_never_written_or_cleared(tmp_path, existing):
    from lightning_models import Plain, loader, mlp, quiet_trainer, vectors

    (tmp_path / "thesis.tex").write_text("all of it")
    trainer = quiet_trainer(GradientRecorder(tmp_path, existing=existing))
    with pytest.raises(
        FileExistsError, match=r"not a recorded run but a folder with `thesis\.tex`"
    ):
        trainer.fit(Plain(mlp()), loader(vectors()))
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [
        ("thesis.tex", "all of it")
    ]


def test_an_existing_run_is_replaced_only_on_request(tmp_path):
    from lightning_models import Plain, loader, mlp, quiet_trainer, vectors

    def train(**settings):
        recorder = GradientRecorder(tmp_path / "run", **settings)
        quiet_trainer(recorder, max_epochs=1).fit(Plain(mlp()), loader(vectors()))
        return HDF5Store.open(tmp_path / "run")

    first = train()
    with pytest.raises(FileExistsError, match=r"already holds a recorded run.*existing='replace'"):
        train()
    assert all(map(same, HDF5Store.open(tmp_path / "run"), first))
    assert len(train(existing="replace")) == len(first)


@pytest.mark.parametrize("name", [".DS_Store", "._segment-000000.h5", ".nfs0001", "notes.txt"])
def test_a_run_beside_other_files_is_replaced_and_they_stay(tmp_path, name):
    filled(HDF5Store(tmp_path / "run"), make_steps(3)).release()
    (tmp_path / "run" / name).write_text("x")
    store = HDF5Store(tmp_path / "run")
    store.clear()
    assert len(filled(store, make_steps(2))) == 2
    assert (tmp_path / "run" / name).read_text() == "x"


def test_files_of_the_system_do_not_make_a_folder_another_one(tmp_path):
    (tmp_path / ".DS_Store").write_text("x")
    assert len(filled(HDF5Store(tmp_path), make_steps(2))) == 2


@pytest.mark.parametrize("number", [errno.EMFILE, errno.EACCES, errno.ESTALE])
def test_a_file_that_cannot_be_opened_is_not_called_damaged(tmp_path, monkeypatch, number):
    filled(HDF5Store(tmp_path / "run"), make_steps(3)).release()

    def fail(path, *args, **kwargs):
        raise OSError(number, os.strerror(number), str(path))

    monkeypatch.setattr(Path, "read_text", fail)
    with pytest.raises(
        StoreFileError, match=rf"recipe.json` cannot be read: {os.strerror(number)}"
    ):
        HDF5Store.open(tmp_path / "run")


def test_float64_rows_are_stored_as_float64(tmp_path):
    step = make_steps(1)[0]
    doubles = [replace(step, sketch=step.sketch.double() / 3)]
    store = filled(HDF5Store(tmp_path / "run", storage="as computed"), doubles)
    assert store[0].sketch.dtype == torch.float64


@pytest.mark.parametrize(
    ("storage", "error"), [("float16", 5e-4), ("bfloat16", 4e-3), ("int8", 5e-3)]
)
def test_rounding_preserves_rows_of_any_magnitude(tmp_path, storage, error):
    """Rows from the smallest to the largest normal float32 do not underflow in one store."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(11, 15, generator=generator) * torch.logspace(-37, 37, 11)[:, None] / 4
    rows[5] = 0
    step = replace(make_steps(11)[10], sketch=rows)
    store = filled(HDF5Store(tmp_path / "run", storage=storage), [step])
    stored = store[0].sketch
    assert stored.dtype == torch.float32
    assert torch.equal(stored[5], torch.zeros(15))
    relative = (stored - rows).abs().amax(dim=1) / rows.abs().amax(dim=1).clamp_min(1e-45)
    assert relative.max() < error


@pytest.mark.parametrize("storage", ["as computed", "float16", "bfloat16", "int8"])
def test_the_smallest_rows_survive_and_nan_rows_stay_nan(tmp_path, storage):
    step = make_steps(2)[1]
    rows = torch.stack([torch.full((15,), 2e-38), torch.full((15,), torch.nan)])
    store = filled(HDF5Store(tmp_path / "run", storage=storage), [replace(step, sketch=rows)])
    torch.testing.assert_close(store[0].sketch[0], rows[0], rtol=1e-2, atol=0)
    assert torch.isnan(store[0].sketch[1]).all()


def test_smaller_number_formats_make_smaller_files(tmp_path):
    step = make_steps(1)[0]
    wide = replace(
        step,
        sample_ids=torch.arange(100),
        weights=torch.ones(100),
        sketch=torch.randn(100, 2000),
    )
    sizes = [
        filled(HDF5Store(tmp_path / name, storage=name), [wide]).size_on_disk
        for name in ("as computed", "float16", "int8")
    ]
    assert sizes[0] > 1.8 * sizes[1] > 3.2 * sizes[2]


def test_a_run_that_lost_a_segment_is_continued_without_overwriting_another(tmp_path):
    steps = make_steps(10)
    filled(HDF5Store(tmp_path / "run"), steps[:8])
    (tmp_path / "run" / "segment-000001.h5").unlink()
    store = HDF5Store(tmp_path / "run")
    store.resume(16)
    for step in steps[8:]:
        store.append(step)
    store.seal()
    expected = [step.index for step in (*steps[:2], *steps[4:])]
    assert [step.index for step in HDF5Store.open(tmp_path / "run", missing="skip")] == expected
    assert [step.index for step in store] == expected


@pytest.mark.parametrize("ranks", [1, 2])
def test_segments_beyond_a_million_are_read_in_order(tmp_path, ranks):
    stores, steps = [HDF5Store(tmp_path / "run") for _ in range(ranks)], make_steps(4)
    for number, store in enumerate(stores):
        if ranks > 1:
            store.join(number, ranks)
    stores[0].begin(replace(RECIPE, ranks=ranks))
    for store in stores:
        store.resume(0)
        store._sink.start_at(store.path, store._identity(999_998), store._shard)
        for step in steps:
            store.append(step)
            store.seal()
    assert list((tmp_path / "run").glob("segment-1000001*.h5"))
    run = HDF5Store.open(tmp_path / "run", missing="skip")
    assert [step.index for step in run] == [0, 2, 4, 6]
    run.resume(4)
    assert [step.index for step in HDF5Store.open(tmp_path / "run", missing="skip")] == [0, 2]
    run.clear()
    assert not list((tmp_path / "run").iterdir())


@pytest.mark.parametrize("size", [1e-45, 1e-300, 1e45])
def test_rows_in_double_precision_keep_their_range_by_default(tmp_path, size):
    (step,) = make_steps(3)[2:]
    rows = step.sketch.double() * size
    filled(HDF5Store(tmp_path / "run"), [replace(step, sketch=rows, curvature_rows=rows)])
    (read,) = HDF5Store.open(tmp_path / "run")
    assert torch.equal(read.sketch, rows)
    assert torch.equal(read.curvature_rows, rows)


def test_a_rewritten_segment_keeps_rows_in_double_precision(tmp_path):
    steps = [replace(step, sketch=step.sketch.double() * 1e-200) for step in make_steps(4)]
    store = filled(HDF5Store(tmp_path / "run"), steps)
    store.resume(6)
    assert all(map(same, HDF5Store.open(tmp_path / "run"), steps[:3]))


def test_the_default_storage_takes_two_bytes_for_float32_and_eight_for_float64(tmp_path):
    store = HDF5Store(tmp_path / "run")
    assert (store.bytes_of(torch.float32), store.bytes_of(torch.float64)) == (2, 8)
    assert HDF5Store(tmp_path / "run", storage="bfloat16").bytes_of(torch.float64) == 2


def test_a_printed_recipe_is_short_and_names_the_settings():
    lines = repr(replace(RECIPE, blocks=RECIPE.blocks * 20, ranks=3)).splitlines()
    assert len(lines) == 11
    assert max(map(len, lines)) < 200
    assert lines[0] == f"Recipe of a `{RECIPE.model}`"
    assert any("processes" in line and line.endswith("3") for line in lines)
    assert any("training samples" in line and line.endswith("9") for line in lines)
