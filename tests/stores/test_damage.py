"""Every damage to a file of a run raises one error that names the file and says what to do."""

import json
import random
import shutil
import zlib
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
import xxhash

from tda_lightning import HDF5Store, Scores, add_snapshots
from tda_lightning.cli import main
from tda_lightning.stores.contract import RECIPE, make_steps
from tda_lightning.stores.hdf5 import segment_reader, stored_rows
from tda_lightning.stores.hdf5.segment_file import HEADER_BYTES, read_header
from tda_lightning.stores.hdf5.verification import verify_files
from tda_lightning.stores.integrity.damage import Checksum, StoreFileError
from tda_lightning.stores.recipe_checks import require_recipe
from tda_lightning.stores.step import Audit, Preconditioner

SEGMENT = "segment-000001.h5"


@pytest.fixture
def run(tmp_path):
    """A run of three segments of two steps, with all that a step can hold, and a snapshot."""
    store = HDF5Store(tmp_path / "run")
    store.begin(RECIPE)
    for number, step in enumerate(make_steps(6)):
        n = len(step.sample_ids)
        store.append(
            replace(
                step,
                terms=torch.ones(n),
                curvature=torch.ones(n),
                curvature_rows=step.sketch,
                audit=Audit(torch.ones(1), torch.zeros(1), 0.0, 1.0),
                preconditioner=Preconditioner(torch.ones(3), torch.ones(5)),
            )
        )
        if number % 2:
            store.seal()
    store.keep_weights(4, {"weight": torch.ones(3)})
    return tmp_path / "run"


def read_all(path):
    """Return everything that a run holds, in a form that can be compared."""
    store = HDF5Store.open(path)
    steps = [
        (
            *(step.index, step.epoch, step.optimizer, step.groups, step.loss),
            *(step.sample_ids.tolist(), step.weights.tolist(), step.sketch.tolist()),
            *(step.terms.tolist(), step.curvature.tolist(), step.curvature_rows.tolist()),
            *(step.preconditioner.rows.tolist(), step.preconditioner.columns.tolist()),
        )
        for step in store
    ]
    facts = [(step.index, step.sample_ids.tolist()) for step in store.facts]
    audits = [(a.gradient.tolist(), a.deviation.tolist(), a.update) for a in store.audits()]
    weights = {index: store.weights_at(index)["weight"].tolist() for index in store.snapshots()}
    ids = (store.train_ids().tolist(), store.visited_ids().tolist())
    return repr((store.recipe, steps, facts, audits, weights, ids))


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path):
    path.write_bytes(b"")


def replace_by_folder(path):
    path.unlink()
    path.mkdir()


def replace_by_link(path):
    path.unlink()
    path.symlink_to("/nowhere/at/all")


def write_other_content(path):
    path.write_bytes(b"\xff\xfe something else")


def without_header(path):
    """Turn a segment into one of an older version, which had no header."""
    path.write_bytes(path.read_bytes()[HEADER_BYTES:])


def as_of_0_1(run):
    """Turn a run into one of version 0.1.0, which had no headers and no manifest."""
    for file in run.glob("segment-*"):
        without_header(file)
    (run / "manifest.jsonl").unlink()


DAMAGES = [truncate, empty, replace_by_folder, replace_by_link, write_other_content]


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", [SEGMENT, "snapshot-00000004.pt"])
def test_a_damaged_file_raises_an_error_that_names_it(run, name, damage):
    damage(run / name)
    with pytest.raises(StoreFileError, match=rf"{name}` is .*; expected .*Restore it from a copy"):
        read_all(run)


@pytest.mark.parametrize("damage", [truncate, empty, write_other_content])
def test_a_damaged_recipe_raises_an_error_that_names_it(run, damage):
    damage(run / "recipe.json")
    with pytest.raises(StoreFileError, match=r"recipe\.json` is damaged; expected the recipe"):
        HDF5Store.open(run)
    with pytest.raises(StoreFileError, match=r"recipe\.json` is damaged"):
        HDF5Store(run).resume(4)


COLUMNS = [
    "steps/index",
    "steps/epoch",
    "steps/optimizer",
    "steps/offset",
    "steps/lr",
    "visits/sample_id",
    "visits/weight",
    "visits/terms",
    "visits/scale",
    "visits/sketch",
    "curvature/offset",
    "curvature/scale",
    "preconditioners/rows",
    "preconditioners/step",
    "audits/gradient",
]


@pytest.mark.parametrize("column", COLUMNS)
@pytest.mark.parametrize("prepare", [as_of_0_1, lambda run: None], ids=["old", "new"])
def test_a_missing_or_short_column_raises_an_error_that_names_the_segment(run, column, prepare):
    prepare(run)
    with h5py.File(run / SEGMENT, "r+", locking=False) as file:
        values = file[column][:]
        del file[column]
    with pytest.raises(StoreFileError, match=SEGMENT):
        read_all(run)
    with h5py.File(run / SEGMENT, "r+", locking=False) as file:
        file[column] = values[:-1]
    with pytest.raises(StoreFileError, match=SEGMENT):
        read_all(run)


@pytest.mark.parametrize("offset", [[0, 3, 2], [1, 3, 7], [0, 2**40, 7], [0, -1, 7], [0, 3, 8]])
@pytest.mark.parametrize("group", ["steps", "curvature"])
def test_offsets_that_do_not_divide_the_rows_raise(run, group, offset):
    as_of_0_1(run)
    with h5py.File(run / SEGMENT, "r+", locking=False) as file:
        file[f"{group}/offset"][:] = offset
    with pytest.raises(StoreFileError, match=f"{SEGMENT}.*do not rise from 0 to 7"):
        read_all(run)


def test_swapped_and_repeated_segments_of_older_versions_raise(run):
    as_of_0_1(run)
    shutil.copy(run / SEGMENT, run / "segment-000003.h5")
    with pytest.raises(StoreFileError, match=r"segment-000003\.h5` begins with step 4"):
        HDF5Store.open(run)
    (run / "segment-000003.h5").unlink()
    (run / SEGMENT).rename(run / "other")
    (run / "segment-000002.h5").rename(run / SEGMENT)
    (run / "other").rename(run / "segment-000002.h5")
    with pytest.raises(StoreFileError, match=r"segment-000002\.h5` begins with step 4"):
        HDF5Store.open(run)


BAD_FIELDS = [
    ("dimension", 0),
    ("dimension", "15"),
    ("dimension", True),
    ("dtype", "bogus"),
    ("reduction", "bogus"),
    ("reduction", None),
    ("preconditioner", []),
    ("curvature", "none "),
    ("ranks", 0),
    ("every_n_steps", -1),
    ("train_ids", [[5, 1]]),
    ("train_ids", [[0, 9], [0, 9]]),
    ("train_ids", [[0]]),
    ("train_ids", 7),
    ("widths", [1, 2, 3]),
    ("widths", [14]),
    ("blocks", [{}]),
    ("blocks", [None]),
    ("left_out", {"name": "net"}),
    ("projector", {}),
    ("projector", {"name": None}),
    ("batch_dims", {"net": "third"}),
    ("model", 3),
    ("versions", None),
    ("is_training", "yes"),
]


@pytest.mark.parametrize(("field", "value"), BAD_FIELDS, ids=lambda value: str(value)[:20])
def test_an_invalid_field_of_the_recipe_raises_with_its_name(run, field, value):
    document = json.loads((run / "recipe.json").read_text())
    document["recipe"][field] = value
    (run / "recipe.json").write_text(json.dumps(document))
    with pytest.raises(StoreFileError, match=rf"recipe\.json` is damaged.*`{field}`"):
        HDF5Store.open(run)


@pytest.mark.parametrize(
    ("field", "value"), [("reduction", "sum"), ("every_n_steps", 2), ("is_training", False)]
)
def test_a_valid_but_changed_field_of_the_recipe_raises(run, field, value):
    document = json.loads((run / "recipe.json").read_text())
    document["recipe"][field] = value
    (run / "recipe.json").write_text(json.dumps(document))
    with pytest.raises(StoreFileError, match=r"recipe\.json` is damaged.*checksum"):
        HDF5Store.open(run)
    del document["crc32"]  # As an older version wrote it.
    (run / "recipe.json").write_text(json.dumps(document))
    assert getattr(HDF5Store.open(run).recipe, field) == value


@pytest.mark.parametrize("field", RECIPE.to_dict())
def test_a_missing_field_of_the_recipe_raises_unless_earlier_versions_lacked_it(field):
    data = {name: value for name, value in RECIPE.to_dict().items() if name != field}
    if field in ("widths", "is_training", "normalized"):
        require_recipe(data)
        return
    with pytest.raises(ValueError, match=f"`{field}` is missing"):
        require_recipe(data)
    with pytest.raises(ValueError, match="`surplus` is unknown"):
        require_recipe({**RECIPE.to_dict(), "surplus": 1})


@pytest.mark.parametrize("content", ["[]", "3", "null", "{}", '{"format": "tda_lightning"}'])
def test_another_document_raises(run, content):
    (run / "recipe.json").write_text(content)
    with pytest.raises((StoreFileError, ValueError), match=rf"{run.name}.*expected"):
        HDF5Store.open(run)


@contextmanager
def named(file):
    """Check that an error is one line that names the file or its folder."""
    try:
        yield
    except Exception as error:
        message = str(error)
        assert file.name in message or str(file.parent) in message, message
        assert "\n" not in message
        raise


@pytest.mark.parametrize("seed", range(40))
def test_random_damage_is_never_raw(run, seed):
    rng = random.Random(seed)
    file = rng.choice(sorted(run.iterdir()))
    raw = bytearray(file.read_bytes())
    at = rng.randrange(len(raw))
    match seed % 3:
        case 0:
            raw[at] ^= 1 << rng.randrange(8)
        case 1:
            raw = raw[:at]
        case 2:
            raw[at : at + 256] = bytes(len(raw[at : at + 256]))
    file.write_bytes(raw)
    with suppress(StoreFileError, ValueError), named(file):
        read_all(run)


@pytest.mark.parametrize("command", ["info", "audit", "data"])
@pytest.mark.parametrize("name", ["segment-000000.h5", "segment-000002.h5", "recipe.json"])
@pytest.mark.parametrize("damage", [truncate, empty, write_other_content])
def test_the_command_line_prints_one_line(run, command, name, damage, capsys):
    damage(run / name)
    assert main([command, str(run)]) == 1
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.count("\n") == 1
    assert name in output.err


def test_an_unexpected_error_on_the_command_line_is_one_line_too(run, monkeypatch, capsys):
    def fail(path):
        raise KeyError("weight")

    monkeypatch.setattr(HDF5Store, "open", fail)
    assert main(["info", str(run)]) == 1
    assert capsys.readouterr().err == "tda-lightning: KeyError: 'weight'\n"


@pytest.mark.parametrize("damage", [truncate, empty, write_other_content])
def test_a_damaged_result_raises_with_its_name(tmp_path, damage):
    file = tmp_path / "scores.npz"
    ids = torch.arange(50)
    Scores(torch.rand(50, 50), ids, ids, "TracIn()").save(file)
    damage(file)
    with pytest.raises(ValueError, match=r"scores\.npz` is damaged; expected a result written by"):
        Scores.load(file)


def test_a_flipped_byte_in_a_result_raises_with_its_name(tmp_path):
    file = tmp_path / "scores.npz"
    ids = torch.arange(50)
    Scores(torch.rand(50, 50), ids, ids, "TracIn()").save(file)
    raw = bytearray(file.read_bytes())
    raw[len(raw) // 2] ^= 1
    file.write_bytes(raw)
    with pytest.raises(ValueError, match=r"scores\.npz` is damaged; expected a result written by"):
        Scores.load(file)


def test_a_missing_result_raises_with_its_name(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no result at .*scores\.npz`; expected a file"):
        Scores.load(tmp_path / "scores.npz")


def test_an_object_array_in_a_result_is_not_unpickled(tmp_path):
    np.savez(tmp_path / "scores.npz", values=np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match=r"scores\.npz` is damaged"):
        Scores.load(tmp_path / "scores.npz")


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_raises_with_its_name(run, tmp_path, damage):
    checkpoint = tmp_path / "last.ckpt"
    torch.save({"state_dict": {"weight": torch.ones(3)}, "global_step": 3}, checkpoint)
    damage(checkpoint)
    with pytest.raises(OSError, match=r"last\.ckpt`.*; expected a"):
        add_snapshots(run, [checkpoint])


def test_a_text_is_no_checkpoint(run, tmp_path):
    (tmp_path / "notes.txt").write_text("# Notes")
    with pytest.raises(OSError, match=r"notes\.txt`.* it is no checkpoint, or holds") as raised:
        add_snapshots(run, [tmp_path / "notes.txt"])
    assert "weights_only" not in str(raised.value)


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(StoreFileError, match=r"file/run` cannot be written: .*Choose another path"):
        HDF5Store(tmp_path / "file" / "run").begin(RECIPE)


def run_of(path, seed=0):
    """Record a small run; runs of different seeds have different rows."""
    store = HDF5Store(path)
    store.begin(RECIPE)
    for number, step in enumerate(make_steps(6)):
        store.append(replace(step, sketch=step.sketch + seed))
        if number % 2:
            store.seal()
    return path


def test_swapped_repeated_and_foreign_segments_raise(tmp_path):
    other = run_of(tmp_path / "other", seed=1)
    cases = {
        "swapped": (2, 1, rf"{SEGMENT}` .*it is another number: its `number` is 2, not 1"),
        "repeated": (1, 3, r"segment-000003\.h5` .*it is another number"),
        "foreign": (other / SEGMENT, 1, rf"{SEGMENT}` .*it belongs to another run"),
    }
    for name, (source, target, message) in cases.items():
        path = run_of(tmp_path / name)
        source = path / f"segment-{source:06d}.h5" if isinstance(source, int) else source
        shutil.copy(source, path / f"segment-{target:06d}.h5")
        with pytest.raises(StoreFileError, match=message):
            HDF5Store.open(path)


def test_a_lost_segment_raises_unless_its_steps_may_be_left_out(run):
    (run / SEGMENT).unlink()
    with pytest.raises(StoreFileError, match=rf"{SEGMENT}` is missing.*missing='skip'"):
        HDF5Store.open(run)
    rest = HDF5Store.open(run, missing="skip")
    assert [step.index for step in rest] == [0, 2, 8, 10]


@pytest.mark.parametrize("part", range(12))
def test_every_flipped_bit_of_a_segment_raises(run, part):
    file = run / SEGMENT
    original, expected = file.read_bytes(), read_all(run)
    rng = random.Random(part)
    for _ in range(10):
        raw = bytearray(original)
        at = rng.randrange(len(raw)) if part else rng.randrange(HEADER_BYTES)
        raw[at] ^= 1 << rng.randrange(8)
        file.write_bytes(raw)
        # Only the padding of the header may change without an effect.
        if at < HEADER_BYTES and original[at] == 0:
            assert read_all(run) == expected
            continue
        with pytest.raises(StoreFileError, match=SEGMENT):
            read_all(run)


def test_every_flipped_bit_of_a_snapshots_weights_raises(run):
    file = run / "snapshot-00000004.pt"
    original = file.read_bytes()
    at = original.index(torch.ones(3).numpy().tobytes())
    for bit in range(24):
        raw = bytearray(original)
        raw[at + bit // 8] ^= 1 << bit % 8
        file.write_bytes(raw)
        with pytest.raises(StoreFileError, match=r"snapshot-00000004\.pt` is damaged"):
            HDF5Store.open(run).weights_at(4)


def test_a_segment_without_a_header_is_read_unverified(run):
    expected = read_all(run)
    as_of_0_1(run)
    assert read_all(run) == expected
    assert {report.state for report in verify_files(run)} == {"unverified", "good"}
    assert main(["verify", str(run)]) == 0


def test_bare_h5py_reads_a_segment_with_a_header(run):
    with h5py.File(run / SEGMENT, locking=False) as file:
        assert file["steps/index"][:].tolist() == [4, 6]
        assert file.userblock_size == HEADER_BYTES
    header = json.loads((run / SEGMENT).read_bytes()[:HEADER_BYTES].split(b"\n")[0])
    assert header["identity"] == {
        "run": json.loads((run / "recipe.json").read_text())["run"],
        "number": 1,
        "rank": 0,
        "ranks": 1,
    }
    raw = (run / SEGMENT).read_bytes()
    assert header["size"] == len(raw) - HEADER_BYTES
    state = xxhash.xxh3_64(
        json.dumps(
            {key: value for key, value in header.items() if key not in ("format", "xxh3")},
            sort_keys=True,
            separators=(",", ":"),
        ).encode()
    )
    start = HEADER_BYTES
    for first, size in header["rows"]:
        state.update(raw[start:first])
        start = first + size
    state.update(raw[start:])
    assert header["xxh3"] == state.hexdigest()


def with_crc32(path):
    """Turn a segment into one of the version that wrote a crc32 of the whole content."""
    raw = path.read_bytes()
    header = json.loads(raw[:HEADER_BYTES].split(b"\n")[0])
    del header["xxh3"], header["rows"]
    header["crc32"] = zlib.crc32(raw[HEADER_BYTES:])
    line = json.dumps(header).encode() + b"\n"
    path.write_bytes(line.ljust(HEADER_BYTES, b"\0") + raw[HEADER_BYTES:])


def test_a_segment_with_a_crc32_is_read_and_verified(run):
    expected = read_all(run)
    for file in run.glob("segment-*"):
        with_crc32(file)
    (run / "manifest.jsonl").unlink()
    assert read_all(run) == expected
    states = {report.name: report.state for report in verify_files(run)}
    assert states.pop("manifest.jsonl") == "unverified"
    assert set(states.values()) == {"good"}
    raw = bytearray((run / SEGMENT).read_bytes())
    for at in random.Random(0).sample(range(HEADER_BYTES, len(raw)), 7):
        raw[at] ^= 1
        (run / SEGMENT).write_bytes(raw)
        with pytest.raises(StoreFileError, match=SEGMENT):
            read_all(run)
        raw[at] ^= 1


def test_verify_lists_every_file_and_returns_0_for_a_good_run(run, capsys):
    assert main(["verify", str(run)]) == 0
    output = capsys.readouterr().out
    assert "6 files, 0 damaged or missing" in output
    for line in (
        "recipe.json           good  the recipe",
        "manifest.jsonl        good  lists 3 segments, 1 snapshots",
        "segment-000001.h5     good  2 steps, index 4 to 6",
        "snapshot-00000004.pt  good  1 tensors before step 4",
    ):
        assert line in output


def test_verify_names_what_is_damaged_or_missing_and_returns_1(run, capsys):
    (run / "segment-000000.h5").unlink()
    raw = bytearray((run / SEGMENT).read_bytes())
    raw[-1] ^= 1
    (run / SEGMENT).write_bytes(raw)
    truncate(run / "snapshot-00000004.pt")
    assert main(["verify", str(run)]) == 1
    output = capsys.readouterr().out
    assert "6 files, 3 damaged or missing" in output
    assert "segment-000000.h5     missing  2 steps, index 0 to 2" in output
    assert "segment-000001.h5     damaged" in output
    assert "segment-000002.h5     good" in output
    assert "snapshot-00000004.pt  damaged" in output


def test_segments_of_older_versions_hold_no_losses(run):
    as_of_0_1(run)
    with h5py.File(run / SEGMENT, "r+", locking=False) as file:
        for name in ("losses", "errors", "margins"):
            del file[f"visits/{name}"]
    facts = HDF5Store.open(run)[0]
    assert facts.terms is not None
    assert (facts.losses, facts.errors, facts.margins) == (None, None, None)


def test_a_block_is_verified_when_it_is_read_first(run, monkeypatch):
    sums = []
    original = Checksum.add
    monkeypatch.setattr(
        Checksum, "add", lambda checksum, part: sums.append(len(part)) or original(checksum, part)
    )
    store = HDF5Store.open(run)
    first = [step.sketch for step in store]
    n_verified = len(sums)
    assert n_verified > 0
    assert all(map(torch.equal, first, [step.sketch for step in store]))
    assert len(sums) == n_verified
    assert len(list(HDF5Store.open(run))) == len(first)
    assert len(sums) == 2 * n_verified


@pytest.mark.parametrize("storage", ["as computed", "float16", "bfloat16", "int8"])
def test_a_long_block_is_read_verified_and_decoded_in_parts(tmp_path, monkeypatch, storage):
    store = HDF5Store(tmp_path / "run", storage=storage)
    store.begin(RECIPE)
    for step in make_steps(5):
        store.append(step)
    store.seal()
    whole = [step.sketch for step in HDF5Store.open(tmp_path / "run")]
    width = HDF5Store.open(tmp_path / "run").recipe.dimension
    for rows in (1, 2, 3, 14, 15):  # The block has 15.
        size = {"as computed": 4, "float16": 2, "bfloat16": 2, "int8": 1}[storage]
        monkeypatch.setattr(stored_rows, "_PART_BYTES", rows * size * width)
        run = HDF5Store.open(tmp_path / "run")
        assert all(map(torch.equal, whole, [step.sketch for step in run]))
    (file,) = (tmp_path / "run").glob("segment-*.h5")
    raw, (first, size) = file.read_bytes(), read_header(file).rows[0]
    monkeypatch.setattr(stored_rows, "_PART_BYTES", size // 4)
    for place in range(first, first + size, size // 11):
        file.write_bytes(raw[:place] + bytes([raw[place] ^ 1]) + raw[place + 1 :])
        with pytest.raises(StoreFileError, match=r"segment-000000.h5` is damaged.*checksum"):
            list(HDF5Store.open(tmp_path / "run"))


@pytest.mark.parametrize("read", [lambda s: s.steps, lambda s: s.visited_ids()])
def test_content_is_verified_by_optimized_python_too(run, read):
    """``python -O`` leaves out every `assert`."""
    source = Path(segment_reader.__file__)
    names = {"__name__": segment_reader.__name__}
    exec(compile(source.read_text(), source, "exec", optimize=1), names)
    read(names["Segment"](run / SEGMENT))
    with h5py.File(run / SEGMENT, locking=False) as file:
        place = file["visits/weight"].id.get_offset()
    raw = bytearray((run / SEGMENT).read_bytes())
    raw[place] ^= 1
    (run / SEGMENT).write_bytes(raw)
    with pytest.raises(StoreFileError, match="its checksum is"):
        read(names["Segment"](run / SEGMENT))
