"""The manifest: a lost or outdated file is noticed, and a killed process leaves a whole run."""

import shutil
from contextlib import suppress
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tda_lightning import HDF5Store
from tda_lightning.stores.contract import RECIPE, make_steps, same
from tda_lightning.stores.hdf5.verification import verify_files
from tda_lightning.stores.integrity import manifest as manifests
from tda_lightning.stores.integrity.damage import StoreFileError
from tda_lightning.stores.integrity.manifest import (
    EndEntry,
    Manifest,
    SegmentEntry,
    SnapshotEntry,
    append_entry,
    read_manifest,
    write_manifest,
)

LAST = "segment-000002.h5"


@pytest.fixture
def run(tmp_path):
    """A run of three segments of two steps, and two snapshots."""
    store = HDF5Store(tmp_path / "run")
    store.begin(RECIPE)
    for number, step in enumerate(make_steps(6)):
        store.append(step)
        if number % 2:
            store.seal()
    for index in (4, 8):
        store.keep_weights(index, {"weight": torch.ones(3)})
    store.release()
    return tmp_path / "run"


def test_a_lost_last_segment_raises_with_its_content(run):
    (run / LAST).unlink()
    with pytest.raises(StoreFileError, match=rf"{LAST}` is missing \(2 steps, index 8 to 10\)"):
        HDF5Store.open(run)
    assert [step.index for step in HDF5Store.open(run, missing="skip")] == [0, 2, 4, 6]
    reports = {report.name: report for report in verify_files(run)}
    assert reports[LAST].state == "missing"
    assert reports[LAST].content == "2 steps, index 8 to 10"


def test_a_segment_from_before_the_training_was_resumed_raises(run, tmp_path):
    shutil.copy(run / LAST, tmp_path / "copy")
    store = HDF5Store(run)
    store.resume(8)
    for step in make_steps(6)[4:]:
        store.append(replace(step, sketch=step.sketch + 1))
    store.seal()
    assert len(HDF5Store.open(run)) == 6
    shutil.copy(tmp_path / "copy", run / LAST)
    with pytest.raises(StoreFileError, match=rf"{LAST}` is another segment than the one in the"):
        HDF5Store.open(run)


def test_a_lost_snapshot_raises_when_snapshots_are_used(run):
    (run / "snapshot-00000008.pt").unlink()
    store = HDF5Store.open(run)
    assert len(list(store)) == 6
    for use in (store.snapshots, lambda: store.weights_at(4)):
        with pytest.raises(StoreFileError, match=r"snapshot-00000008\.pt` is missing"):
            use()
    assert HDF5Store.open(run, missing="skip").snapshots() == [4]


def test_a_swapped_snapshot_raises(run):
    torch.save({"weight": torch.zeros(3)}, run / "snapshot-00000008.pt")
    store = HDF5Store.open(run)
    assert store.weights_at(4)["weight"].tolist() == [1, 1, 1]
    with pytest.raises(StoreFileError, match=r"snapshot-00000008\.pt` is damaged.*manifest"):
        store.weights_at(8)


def test_a_replaced_snapshot_is_listed_anew(run):
    HDF5Store(run).keep_weights(8, {"weight": torch.zeros(3)})
    assert HDF5Store.open(run).weights_at(8)["weight"].tolist() == [0, 0, 0]


def test_a_lost_manifest_raises_unless_it_may_be_left_out(run):
    (run / "manifest.jsonl").unlink()
    with pytest.raises(StoreFileError, match=r"manifest\.jsonl` is missing.*missing='skip'"):
        HDF5Store.open(run)
    assert len(HDF5Store.open(run, missing="skip")) == 6


def test_a_lost_segment_keeps_its_number_when_the_training_is_resumed(run):
    (run / LAST).unlink()
    store = HDF5Store(run)
    store.resume(12)
    store.append(replace(make_steps(1)[0], index=12))
    store.seal()
    assert (run / "segment-000003.h5").exists()
    with pytest.raises(StoreFileError, match=rf"{LAST}` is missing"):
        HDF5Store.open(run)
    assert [step.index for step in HDF5Store.open(run, missing="skip")] == [0, 2, 4, 6, 12]


@pytest.mark.parametrize(
    "index", [pytest.param(0, marks=pytest.mark.slow), 3, pytest.param(8, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("action", ["resume", "clear", "append"])
def test_a_kill_at_any_change_of_the_folder_leaves_a_whole_run(
    run, tmp_path, monkeypatch, action, index
):
    """Before every renaming, deletion and line of the manifest, the folder is copied and opened."""
    copies = []

    def copied(original):
        def change(*arguments, **settings):
            copy = tmp_path / f"copy-{len(copies)}"
            shutil.copytree(run, copy)
            copies.append(copy)
            return original(*arguments, **settings)

        return change

    for name in ("replace", "unlink"):
        monkeypatch.setattr(type(run), name, copied(getattr(type(run), name)))
    monkeypatch.setattr(manifests.os, "write", copied(manifests.os.write))
    perform(action, run, index)
    monkeypatch.undo()
    assert len(copies) > 1
    for copy in (*copies, run):
        if (copy / "recipe.json").exists():
            opened = HDF5Store.open(copy)
            assert all(map(same, opened, make_steps(8)))
            assert all(opened.weights_at(index) for index in opened.snapshots())
            assert {report.state for report in verify_files(copy)} <= {"good", "unverified"}


def perform(action, run, index):
    store = HDF5Store(run)
    if action == "clear":
        store.clear()
        return
    store.resume(index)
    if action == "append":
        for step in make_steps(8):
            if step.index >= index:
                store.append(step)
                store.seal()
        store.keep_weights(4, {"weight": torch.zeros(3)})


names = st.text(st.characters(codec="utf-8"), max_size=9)
numbers = st.integers(0, 2**40)
entries = st.one_of(
    st.builds(SegmentEntry, st.integers(0, 9), numbers, numbers, numbers, names),
    st.builds(SnapshotEntry, st.integers(0, 9), numbers, names),
    st.builds(EndEntry, st.text("0123456789abcdef", min_size=1, max_size=9)),
)
quick = settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@quick
@given(written=st.lists(entries, max_size=5), appended=st.lists(entries, max_size=5))
def test_a_manifest_is_read_back(tmp_path, written, appended):
    file = tmp_path / "manifest.jsonl"
    write_manifest(file, Manifest.of("run", written))
    for entry in appended:
        append_entry(file, entry)
    assert read_manifest(file, "run") == Manifest.of("run", [*written, *appended])


@quick
@given(appended=st.lists(entries, min_size=1, max_size=5), cut=st.integers(1, 50))
def test_the_beginning_of_a_line_is_ignored(tmp_path, appended, cut):
    file = tmp_path / "manifest.jsonl"
    write_manifest(file, Manifest("run"))
    for entry in appended:
        append_entry(file, entry)
    file.write_bytes(file.read_bytes()[:-cut])
    assert read_manifest(file, "run") == Manifest.of("run", appended[:-1])


@quick
@given(written=st.lists(entries, min_size=1, max_size=5), data=st.data())
def test_a_flipped_bit_of_a_manifest_raises_or_changes_nothing(tmp_path, written, data):
    file = tmp_path / "manifest.jsonl"
    expected = Manifest.of("run", written)
    write_manifest(file, expected)
    raw = bytearray(file.read_bytes())
    # Without its last newline, the last line is a beginning.
    at = data.draw(st.integers(0, len(raw) - 2))
    raw[at] ^= 1 << data.draw(st.integers(0, 7))
    file.write_bytes(raw)
    with suppress(StoreFileError):
        assert read_manifest(file, "run") == expected
