"""A run from a stranger is data: it cannot read or write elsewhere, hang, or fill the memory."""

import json
import os
import shutil
import zlib
from contextlib import suppress
from dataclasses import replace

import h5py
import numpy as np
import pytest
import torch

from tda_lightning import HDF5Store, Scores, self_influence
from tda_lightning.cli import main
from tda_lightning.stores.contract import RECIPE, make_steps
from tda_lightning.stores.hdf5.segment_file import HEADER_BYTES
from tda_lightning.stores.integrity.damage import StoreFileError, checksum_of_document
from tda_lightning.stores.integrity.writer_lock import LOCK

SEGMENT = "segment-000000.h5"


@pytest.fixture
def run(tmp_path):
    """A run of one segment without checksums: a stranger can compute them, too."""
    store = HDF5Store(tmp_path / "run")
    store.begin(RECIPE)
    for step in make_steps(3):
        store.append(step)
    store.seal()
    store.keep_weights(4, {"weight": torch.ones(3)})
    store.release()
    file = tmp_path / "run" / SEGMENT
    file.write_bytes(file.read_bytes()[HEADER_BYTES:])
    (tmp_path / "run" / "manifest.jsonl").unlink()
    return tmp_path / "run"


def replace_dataset(run, name, create):
    with h5py.File(run / SEGMENT, "r+", locking=False) as file:
        del file[name]
        create(file)


def edit_recipe(run, **changes):
    document = json.loads((run / "recipe.json").read_text())
    document["recipe"].update(changes)
    del document["crc32"]
    content = json.dumps(document, sort_keys=True, separators=(",", ":")).encode()
    document["crc32"] = zlib.crc32(content)
    (run / "recipe.json").write_text(json.dumps(document))


def read_all(run):
    store = HDF5Store.open(run)
    return [step.sketch.sum() for step in store], store.visited_ids()


def external_link(file, name, elsewhere):
    with h5py.File(elsewhere, "w") as other:
        other["secret"] = np.arange(6)
    file[name] = h5py.ExternalLink(str(elsewhere), "secret")


def soft_link(file, name, elsewhere):
    file[name] = h5py.SoftLink("/steps/epoch")


def external_storage(file, name, elsewhere):
    elsewhere.write_bytes(bytes(range(48)))
    external = [(str(elsewhere), 0, 48)]
    file.create_dataset(name, (6,), "i8", external=external)


def virtual_dataset(file, name, elsewhere):
    with h5py.File(elsewhere, "w") as other:
        other["secret"] = np.arange(6)
    layout = h5py.VirtualLayout((6,), "i8")
    layout[:] = h5py.VirtualSource(str(elsewhere), "secret", (6,))
    file.create_virtual_dataset(name, layout)


@pytest.mark.parametrize(
    "create",
    [external_link, soft_link, external_storage, virtual_dataset],
    ids=lambda f: f.__name__,
)
@pytest.mark.parametrize("name", ["visits/sample_id", "steps/index", "steps/offset"])
def test_data_in_other_files_are_not_read(run, tmp_path, name, create):
    replace_dataset(run, name, lambda file: create(file, name, tmp_path / "elsewhere"))
    with pytest.raises(StoreFileError, match=rf"{SEGMENT}.*not (read|followed)"):
        read_all(run)
    with pytest.raises(StoreFileError, match=rf"{SEGMENT}.*not (read|followed)"):
        HDF5Store.open(run).visited_ids()


@pytest.mark.parametrize("name", ["steps/index", "visits/sample_id", "preconditioners/step"])
@pytest.mark.parametrize("settings", [{}, {"compression": "gzip"}, {"chunks": (2**20,)}], ids=str)
def test_a_size_far_beyond_that_of_the_file_is_refused(run, name, settings):
    def create(file):
        file.create_dataset(name, shape=(2**40,), dtype="i8", **settings)

    replace_dataset(run, name, create)
    with pytest.raises(
        StoreFileError, match=rf"{SEGMENT}.*'{name}' claims 8,796,093,022,208 bytes"
    ):
        read_all(run)


@pytest.mark.parametrize("name", [".snapshot-00000005.pt.partial", ".segment-000001.h5.partial"])
def test_writing_does_not_follow_a_link(run, tmp_path, name):
    (tmp_path / "mine").write_text("precious")
    (run / name).symlink_to(tmp_path / "mine")
    store = HDF5Store(run)
    store.resume(6)
    store.append(replace(make_steps(1)[0], index=6))
    store.seal()
    store.keep_weights(5, {"weight": torch.ones(3)})
    assert (tmp_path / "mine").read_text() == "precious"
    assert len(HDF5Store.open(run)) == 4


@pytest.mark.parametrize("name", [".recipe.json.partial", ".manifest.jsonl.partial", LOCK])
def test_beginning_a_run_does_not_follow_a_link(tmp_path, name):
    (tmp_path / "mine").write_text("precious")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / name).symlink_to(tmp_path / "mine")
    HDF5Store(tmp_path / "run").begin(RECIPE)
    assert (tmp_path / "mine").read_text() == "precious"


@pytest.mark.parametrize(
    "name", [SEGMENT, "snapshot-00000004.pt", "manifest.jsonl", "segment-000001.h5"]
)
def test_a_pipe_is_refused_rather_than_waited_for(run, name):
    (run / name).unlink(missing_ok=True)
    os.mkfifo(run / name)
    with pytest.raises(StoreFileError, match=rf"{name}.*not a regular file"):
        HDF5Store.open(run).weights_at(4)


def test_a_pipe_in_place_of_the_recipe_is_no_run(run):
    (run / "recipe.json").unlink()
    os.mkfifo(run / "recipe.json")
    with pytest.raises(ValueError, match="is not a recorded run"):
        HDF5Store.open(run)


@pytest.mark.parametrize(
    "content", ["[" * 10**6 + "]" * 10**6, '{"a":' * 10**5 + "1" + "}" * 10**5]
)
def test_deep_json_is_one_error(run, content):
    (run / "recipe.json").write_text(content)
    with pytest.raises(StoreFileError, match=r"recipe\.json` is damaged.*RecursionError"):
        HDF5Store.open(run)


def test_a_training_set_of_any_size_costs_no_more_than_the_visits(run):
    edit_recipe(run, train_ids=[[0, 10**9]])
    store = HDF5Store.open(run)
    visited = store.visited_ids()
    assert store.n_train == 10**9
    with pytest.warns(UserWarning, match=r"visited \d+ of 1,000,000,000 training samples"):
        assert store.train_ids().equal(visited)
    with pytest.warns(UserWarning, match="are left out: their scores are all zero"):
        assert self_influence(store, progress=False).train_ids.equal(visited)


def test_a_large_training_set_is_whole_if_most_of_it_was_visited(run, monkeypatch):
    monkeypatch.setattr("tda_lightning.stores.store.MAX_UNVISITED", 3)
    visited = HDF5Store.open(run).visited_ids()
    last = int(visited.max()) + 1
    edit_recipe(run, train_ids=[[0, last]])
    n_unvisited = last - len(visited)
    monkeypatch.setattr("tda_lightning.stores.store.MAX_UNVISITED", n_unvisited)
    assert len(HDF5Store.open(run).train_ids()) == last
    monkeypatch.setattr("tda_lightning.stores.store.MAX_UNVISITED", n_unvisited - 1)
    with pytest.warns(UserWarning, match="left out"):
        assert HDF5Store.open(run).train_ids().equal(visited)


def test_a_huge_recipe_is_not_read(run):
    with (run / "recipe.json").open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(StoreFileError, match=r"recipe\.json.*1,099,511,627,776 bytes"):
        HDF5Store.open(run)


@pytest.mark.parametrize(
    ("field", "value"), [("ranks", 10**7), ("train_ids", [[0, 2**40]]), ("dimension", -1)]
)
def test_absurd_numbers_are_refused(run, field, value):
    edit_recipe(run, **{field: value})
    with pytest.raises(StoreFileError, match=rf"recipe\.json` is damaged.*`{field}`"):
        HDF5Store.open(run)


def test_an_archive_that_grows_a_thousandfold_is_not_read(tmp_path):
    np.savez_compressed(tmp_path / "bomb.npz", values=np.zeros(2**22))
    with pytest.raises(ValueError, match=r"bomb\.npz` is damaged.*claims 33,554,560 bytes"):
        Scores.load(tmp_path / "bomb.npz")


ESCAPE = "\x1b]0;owned\x07\x1b[2J\r\nforged"


@pytest.mark.parametrize("command", ["info", "audit", "data", "verify"])
@pytest.mark.parametrize("field", ["model", "versions", "left_out", "optimizer", "version"])
def test_no_control_character_reaches_the_terminal(run, command, field, capsys):
    left_out = [{"name": ESCAPE, "layer": "L", "size": 1, "reason": ESCAPE}]
    match field:
        case "optimizer":
            names = np.array([ESCAPE] * 3, dtype=object)
            replace_dataset(
                run, "steps/optimizer", lambda f: f.__setitem__("steps/optimizer", names)
            )
        case "version":
            document = json.loads((run / "recipe.json").read_text())
            (run / "recipe.json").write_text(json.dumps({**document, "version": ESCAPE}))
        case _:
            values = {"model": ESCAPE, "versions": {ESCAPE: ESCAPE}, "left_out": left_out}
            edit_recipe(run, **{field: values[field]})
    assert main([command, str(run)]) == 1
    captured = capsys.readouterr()
    assert not set((captured.out + captured.err).replace("\n", "")) & set("\x1b\x07\r")
    assert captured.err.count("\n") <= 1


def test_names_of_files_are_escaped_in_messages(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "\x1b[2J").touch()
    with pytest.raises(ValueError, match="is not a recorded run") as raised:
        HDF5Store.open(tmp_path / "run")
    assert "\x1b" not in str(raised.value)


@pytest.mark.parametrize("offset", [[0, -5, 6], [0, 10**15, 6], [0, 2, 1000]])
def test_offsets_do_not_reach_beyond_the_rows(run, offset):
    with h5py.File(run / SEGMENT, "r+", locking=False) as file:
        file["steps/offset"][1:] = offset
        with suppress(KeyError):
            file["steps/offset"][0] = 0
    with pytest.raises(StoreFileError, match=f"{SEGMENT}.*do not rise"):
        read_all(run)


@pytest.fixture
def sealed_run(tmp_path):
    """A run of two segments and a snapshot, with checksums and a manifest."""
    store = HDF5Store(tmp_path / "sealed")
    store.begin(RECIPE)
    for step in make_steps(2):
        store.append(step)
        store.seal()
    store.keep_weights(2, {"weight": torch.ones(3)})
    store.release()
    return tmp_path / "sealed"


@pytest.mark.parametrize("number", ["100000000000", "9" * 200], ids=["1e11", "200 digits"])
def test_a_segment_of_an_absurd_number_costs_no_time(sealed_run, number, capsys):
    shutil.copy(sealed_run / SEGMENT, sealed_run / f"segment-{number}.h5")
    with pytest.raises(StoreFileError, match=r"segment-000002.h5` is missing"):
        read_all(sealed_run)
    assert main(["verify", str(sealed_run)]) == 1
    assert "the first of" in capsys.readouterr().out


def read_whole(run):
    store = HDF5Store.open(run)
    return list(store), store.weights_at(2)


@pytest.mark.parametrize("name", [SEGMENT, "snapshot-00000002.pt", "manifest.jsonl", "recipe.json"])
def test_a_sparse_file_of_any_size_is_not_read(sealed_run, name):
    os.truncate(sealed_run / name, 2**37)
    with pytest.raises(StoreFileError, match=rf"{name}.*137,438,953,472 bytes"):
        read_whole(sealed_run)


def add_line(run, **entry):
    line = {**entry, "check": checksum_of_document(entry)}
    with (run / "manifest.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")


@pytest.mark.parametrize(
    "entry",
    [
        {"kind": "segment", "number": -5, "first": 0, "last": 1, "steps": 2, "xxh3": ""},
        {"kind": "segment", "number": "\x1b[2J", "first": 0, "last": 1, "steps": 2, "xxh3": ""},
        {"kind": "segment", "number": 7, "first": [], "last": 1, "steps": 2, "xxh3": ""},
        {"kind": "snapshot", "index": 10**30, "size": 1, "xxh3": "x"},
        {"kind": "snapshot", "index": True, "size": 1, "xxh3": "x"},
        {"kind": "end", "weights": {"a": 1}},
        {"kind": "comet"},
    ],
    ids=lambda entry: entry["kind"],
)
def test_entries_of_another_kind_are_one_error_of_the_manifest(sealed_run, entry, capsys):
    add_line(sealed_run, **entry)
    with pytest.raises(StoreFileError, match=r"manifest.jsonl` is damaged"):
        HDF5Store.open(sealed_run)
    assert main(["verify", str(sealed_run)]) == 1
    assert "\x1b" not in capsys.readouterr().out


def test_a_listed_segment_of_an_absurd_number_costs_no_time(sealed_run):
    entry = {"number": 10**11, "first": 9, "last": 9, "steps": 1, "xxh3": ""}
    add_line(sealed_run, kind="segment", **entry)
    with pytest.raises(StoreFileError, match=r"segment-100000000000.h5` is missing"):
        HDF5Store.open(sealed_run)
    assert main(["verify", str(sealed_run)]) == 1


def test_a_backup_of_hard_links_stays_as_it_is(sealed_run, tmp_path):
    shutil.copytree(sealed_run, tmp_path / "backup", copy_function=os.link)
    HDF5Store.open(sealed_run).keep_weights(0, {"weight": torch.zeros(3)})
    assert HDF5Store.open(tmp_path / "backup").snapshots() == [2]
    assert HDF5Store.open(sealed_run).snapshots() == [0, 2]


def test_a_manifest_that_links_to_another_file_is_not_written(sealed_run, tmp_path):
    (tmp_path / "mine").write_text("precious")
    (sealed_run / "manifest.jsonl").unlink()
    (sealed_run / "manifest.jsonl").symlink_to(tmp_path / "mine")
    store = HDF5Store.open(sealed_run, missing="skip")
    with pytest.raises(OSError, match=r"manifest.jsonl` is a link; expected the manifest itself"):
        store.keep_weights(0, {})
    assert (tmp_path / "mine").read_text() == "precious"


@pytest.mark.parametrize("ranks", [2, 10_000])
def test_segments_of_another_number_of_processes_are_not_left_out_in_silence(run, ranks):
    edit_recipe(run, ranks=ranks)
    with pytest.raises(StoreFileError, match=rf"{SEGMENT}` is no segment of a run of"):
        HDF5Store.open(run)


def test_scores_of_inconsistent_shapes_are_not_loaded(tmp_path):
    ids = {"query_ids": np.arange(2), "train_ids": np.arange(1)}
    np.savez(tmp_path / "scores.npz", values=np.zeros((2, 3)), method="TracIn()", **ids)
    with pytest.raises(ValueError, match=r"`values` has shape \(2, 3\), and `train_ids` \(1,\)"):
        Scores.load(tmp_path / "scores.npz")


def test_an_unknown_number_format_is_refused(run):
    with h5py.File(run / SEGMENT, "r+", locking=False) as file:
        file["visits"].attrs["storage"] = "bogus"
    with pytest.raises(StoreFileError, match=rf"{SEGMENT}` is damaged.*'storage' is 'bogus'"):
        read_all(run)
