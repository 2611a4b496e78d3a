"""Two processes record the same run as one process does from the same global batches."""

import shutil

import ddp_training
import pytest
import torch
from ddp_processes import result_of, train
from lightning_models import Plain, mlp, vectors

from tda_lightning import HDF5Store, TracIn, attribute
from tda_lightning.passes.queries import record_queries

# One process of pytest runs all tests of this file, which share trainings.
pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("ddp")]

COMPARED = {
    "SGD": {},
    "AdamW": {"optimizer": "AdamW"},
    "accumulated": {"trainer": {"accumulate_grad_batches": 2}},
    "clipped": {"trainer": {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"}},
    # The discriminator's pass does not reach the generator, so DDP must find unused parameters.
    "GAN": {"gan": True, "strategy": "ddp_find_unused_parameters_true"},
}
SHARED = [
    *COMPARED.items(),
    ("plain", {"record": False}),
    ("loose", {"max_overhead": 1e6}),
    ("tight", {"max_overhead": 1e-6}),
    ("sampled labels", {"curvature": "fisher"}),
    ("padded", {"ragged": 1}),
    ("saved", {"checkpoint": 2, "snapshots": 2, "store": "SlowStore", "optimizer": "AdamW"}),
    ("in memory", {"store": "MemoryStore", "refused": True}),
    ("existing", {}),
    ("existing", {"refused": True}),
    ("existing", {"existing": "replace", "trainer": {"max_epochs": 1}}),
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Return the folder of trainings that the same two processes have made, one by one."""
    folder = tmp_path_factory.mktemp("trained")
    train(folder, *SHARED)
    return folder


@pytest.fixture
def train_alone(monkeypatch):
    """Return a function that trains in this process, and leaves its environment unchanged."""
    monkeypatch.setenv("PL_GLOBAL_SEED", "3")
    return lambda folder, **settings: ddp_training.train(folder, 1, settings)


def by_id(step, values):
    return values[torch.argsort(step.sample_ids, stable=True)]


def assert_same_steps(run, expected_run, tolerance=1e-5):
    assert [step.index for step in run] == [step.index for step in expected_run]
    for a, b in zip(run, expected_run, strict=True):
        assert sorted(a.sample_ids.tolist()) == sorted(b.sample_ids.tolist())
        for name in ("sketch", "weights", "terms", "curvature"):
            pair = [(step, getattr(step, name)) for step in (a, b)]
            present = [by_id(step, values) for step, values in pair if values is not None]
            assert len(present) != 1
            if present:
                torch.testing.assert_close(*present, rtol=1e-4, atol=tolerance)


@pytest.mark.parametrize("name", COMPARED)
def test_two_processes_record_what_one_does(tmp_path, trained, train_alone, name):
    train_alone(tmp_path, **COMPARED[name])
    result_of_one, result_of_two = result_of(tmp_path), result_of(trained / name)
    single, double = (HDF5Store.open(folder / "run") for folder in (tmp_path, trained / name))
    assert_same_steps(single, double)
    assert double.recipe.ranks == 2
    assert result_of_two["read"] == result_of_one["read"] == len(single)
    for a, b in zip(result_of_one["weights"], result_of_two["weights"], strict=True):
        torch.testing.assert_close(torch.tensor(a), torch.tensor(b), rtol=1e-4, atol=1e-6)
    assert all(float(audit.explained().min()) > 0.9999 for audit in double.audits())


def test_rows_of_sampled_labels_come_from_all_processes(trained):
    for step in HDF5Store.open(trained / "sampled labels" / "run"):
        assert step.curvature_rows.shape == step.sketch.shape


@pytest.mark.parametrize(("name", "steps"), [("loose", 6), ("tight", 1)])
def test_all_processes_record_the_same_steps_under_a_budget(trained, name, steps):
    assert result_of(trained / "plain")["weights"] == result_of(trained / name)["weights"]
    store = HDF5Store.open(trained / name / "run")
    assert [step.index for step in store] == list(range(steps))
    assert all(len(step.sample_ids) == 4 for step in store)
    assert (store.recipe.every_n_steps == 1) == (name == "loose")


def test_recording_by_two_processes_leaves_weights_bit_identical(trained):
    assert result_of(trained / "plain")["weights"] == result_of(trained / "SGD")["weights"]


def test_recording_by_two_spawned_processes_leaves_weights_bit_identical(tmp_path):
    spawned = {"strategy": "ddp_spawn"}
    train(tmp_path, ("plain", {**spawned, "record": False}), ("recorded", spawned))
    assert result_of(tmp_path / "plain")["weights"] == result_of(tmp_path / "recorded")["weights"]


def test_padding_duplicates_are_separate_visits(trained):
    store = HDF5Store.open(trained / "padded" / "run")
    ids = torch.cat([step.sample_ids for step in store[:3]])
    assert sorted(ids.tolist()) == [0, *range(11)]


def test_a_killed_process_leaves_a_readable_store_that_can_be_resumed(tmp_path):
    killed = {"trainer": {"max_epochs": 4}, "checkpoint": 4, "dies": 7}
    train(tmp_path, ("parts", killed), fails=True)
    store = HDF5Store.open(tmp_path / "parts" / "run")
    assert len(store) >= 4
    assert [step.index for step in store] == list(range(len(store)))
    path = str(tmp_path / "parts" / "step=4.ckpt")
    shorter = {"max_epochs": 4, "max_steps": 6}
    train(tmp_path, ("parts", {"trainer": shorter, "resume": path}))
    store = HDF5Store.open(tmp_path / "parts" / "run")
    assert [step.index for step in store] == list(range(6))


def test_checkpoints_and_snapshots_cover_all_processes(trained):
    folder = trained / "saved"
    assert result_of(folder)["seen"] == [[2, 2], [4, 4], [6, 6]], (
        "written before the other process had sealed its part"
    )
    assert (folder / "writers").read_text().split() == ["0:0", "0:2", "0:4"]
    store = HDF5Store.open(folder / "run")
    assert store.snapshots() == [0, 2, 4]
    saved = torch.load(folder / "step=4.ckpt", weights_only=True)["state_dict"]
    snapshot = store.weights_at(4)
    assert snapshot.keys() == saved.keys()
    assert all(torch.equal(snapshot[name], weight) for name, weight in saved.items())
    model, queries = Plain(mlp()), vectors(5)[:]
    scores = attribute(store, model, queries, method=TracIn(), at=4, progress=False)
    model.load_state_dict(saved)
    rows = record_queries(model, queries, like=store, at=4)
    expected = TracIn().attribute(store, rows, progress=False)
    torch.testing.assert_close(scores.values, expected.values)
    assert scores.values.count_nonzero() == scores.values.numel() == 5 * 12


def test_steps_without_the_part_of_one_process_are_left_out(tmp_path, trained):
    folder = shutil.copytree(trained / "saved", tmp_path / "copy")
    lost_parts = sorted(folder.glob("run/segment-*-rank-1.h5"))
    lost_parts[1].unlink()
    with pytest.raises(
        OSError, match=r"is missing \(2 steps, index 2 to 3\); expected all segments"
    ):
        HDF5Store.open(folder / "run")
    rest = HDF5Store.open(folder / "run", missing="skip")
    assert [step.index for step in rest] == [0, 1, 4, 5]
    lost_parts[0].unlink()
    path, longer = str(folder / "step=4.ckpt"), {"max_epochs": 3}
    train(tmp_path, ("copy", {"optimizer": "AdamW", "trainer": longer, "resume": path}))
    warnings = result_of(folder)["warnings"]
    assert any(
        "the store lacks 4 steps that were recorded before this ch" in text for text in warnings
    )
    with pytest.raises(OSError, match="is missing"):  # Resuming does not bring them back.
        HDF5Store.open(folder / "run")
    store = HDF5Store.open(folder / "run", missing="skip")
    assert [step.index for step in store] == [4, 5, 6, 7, 8]
    assert all(len(step.sample_ids) == 4 for step in store)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_store_that_processes_cannot_share_raises_in_all(trained, rank):
    error = (trained / "in memory" / f"error-{rank}").read_text()
    assert "A `MemoryStore` cannot be written by 2 processes" in error


@pytest.mark.parametrize("rank", [0, 1])
def test_an_existing_run_raises_in_all_processes(trained, rank):
    error = (trained / "existing" / f"error-{rank}").read_text()
    assert "already holds a recorded run" in error


def test_two_processes_replace_an_existing_run(trained):
    assert len(HDF5Store.open(trained / "existing" / "run")) == 3
