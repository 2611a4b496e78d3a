"""Two processes record the same run as one process does from the same global batches."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lightning_models import Plain, mlp, vectors

from tda_lightning import HDF5Store, TracIn, attribute
from tda_lightning.passes.queries import record_queries

SUPPORT = Path(__file__).parents[1] / "support"


# The discriminator's pass does not reach the generator, so DDP must find unused parameters.
GAN = {"gan": True, "strategy": "ddp_find_unused_parameters_true"}
CLIPPED = {"trainer": {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"}}


def train(folder, devices, *, fails=False, **given):
    folder.mkdir(exist_ok=True)
    given = {"optimizer": "SGD", **given}
    command = [sys.executable, "ddp_training.py", str(folder), str(devices), json.dumps(given)]
    environment = {key: value for key, value in os.environ.items() if key != "PL_GLOBAL_SEED"}
    result = subprocess.run(
        command, cwd=SUPPORT, env=environment, capture_output=True, text=True, timeout=120
    )
    assert (result.returncode != 0) == fails, result.stderr[-3000:]
    if fails:
        return result.stderr
    return json.loads((folder / "result.json").read_text())


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


@pytest.mark.slow
@pytest.mark.parametrize(
    "given",
    [{}, {"optimizer": "AdamW"}, {"trainer": {"accumulate_grad_batches": 2}}, CLIPPED, GAN],
    ids=str,
)
def test_two_processes_record_what_one_does(tmp_path, given):
    result_of_one = train(tmp_path / "one", 1, **given)
    result_of_two = train(tmp_path / "two", 2, **given)
    single, double = (HDF5Store.open(tmp_path / name / "run") for name in ("one", "two"))
    assert_same_steps(single, double)
    assert double.recipe.ranks == 2
    assert result_of_two["read"] == result_of_one["read"] == len(single)
    for a, b in zip(result_of_one["weights"], result_of_two["weights"], strict=True):
        torch.testing.assert_close(torch.tensor(a), torch.tensor(b), rtol=1e-4, atol=1e-6)
    assert all(float(audit.explained().min()) > 0.9999 for audit in double.audits())


@pytest.mark.slow
def test_rows_of_sampled_labels_come_from_all_processes(tmp_path):
    train(tmp_path, 2, curvature="fisher")
    for step in HDF5Store.open(tmp_path / "run"):
        assert step.curvature_rows.shape == step.sketch.shape


@pytest.mark.slow
@pytest.mark.parametrize(("limit", "steps"), [(1e6, 6), (1e-6, 1)], ids=["loose", "tight"])
def test_all_processes_record_the_same_steps_under_a_budget(tmp_path, limit, steps):
    plain = train(tmp_path / "plain", 2, record=False)
    recorded = train(tmp_path / "recorded", 2, max_overhead=limit)
    assert plain["weights"] == recorded["weights"]
    store = HDF5Store.open(tmp_path / "recorded" / "run")
    assert [step.index for step in store] == list(range(steps))
    assert all(len(step.sample_ids) == 4 for step in store)
    assert (store.recipe.every_n_steps == 1) == (limit > 1)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "ddp_spawn"])
def test_recording_by_two_processes_leaves_weights_bit_identical(tmp_path, strategy):
    plain = train(tmp_path / "plain", 2, strategy=strategy, record=False)
    recorded = train(tmp_path / "recorded", 2, strategy=strategy)
    assert plain["weights"] == recorded["weights"]


@pytest.mark.slow
def test_padding_duplicates_are_separate_visits(tmp_path):
    train(tmp_path, 2, ragged=1)
    store = HDF5Store.open(tmp_path / "run")
    ids = torch.cat([step.sample_ids for step in store[:3]])
    assert sorted(ids.tolist()) == [0, *range(11)]


@pytest.mark.slow
def test_a_killed_process_leaves_a_readable_store_that_can_be_resumed(tmp_path):
    train(tmp_path / "whole", 2, trainer={"max_epochs": 4})
    train(tmp_path / "parts", 2, trainer={"max_epochs": 4}, checkpoint=4, dies=7, fails=True)
    store = HDF5Store.open(tmp_path / "parts" / "run")
    assert len(store) >= 4
    assert [step.index for step in store] == list(range(len(store)))
    path = str(tmp_path / "parts" / "step=4.ckpt")
    train(tmp_path / "parts", 2, trainer={"max_epochs": 4, "max_steps": 6}, resume=path)
    store = HDF5Store.open(tmp_path / "parts" / "run")
    assert [step.index for step in store] == list(range(6))


@pytest.mark.slow
def test_checkpoints_and_snapshots_cover_all_processes(tmp_path):
    result = train(tmp_path, 2, checkpoint=2, snapshots=2, store="SlowStore", optimizer="AdamW")
    assert result["seen"] == [[2, 2], [4, 4], [6, 6]], (
        "written before the other process had sealed its part"
    )
    assert (tmp_path / "writers").read_text().split() == ["0:0", "0:2", "0:4"]
    store = HDF5Store.open(tmp_path / "run")
    assert store.snapshots() == [0, 2, 4]
    saved = torch.load(tmp_path / "step=4.ckpt", weights_only=True)["state_dict"]
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


@pytest.mark.slow
def test_steps_without_the_part_of_one_process_are_left_out(tmp_path):
    train(tmp_path, 2, checkpoint=2, optimizer="AdamW")
    lost_parts = sorted(tmp_path.glob("run/segment-*-rank-1.h5"))
    lost_parts[1].unlink()
    with pytest.raises(
        OSError, match=r"is missing \(2 steps, index 2 to 3\); expected all segments"
    ):
        HDF5Store.open(tmp_path / "run")
    rest = HDF5Store.open(tmp_path / "run", missing="skip")
    assert [step.index for step in rest] == [0, 1, 4, 5]
    lost_parts[0].unlink()
    path, longer = str(tmp_path / "step=4.ckpt"), {"max_epochs": 3}
    warnings = train(tmp_path, 2, optimizer="AdamW", trainer=longer, resume=path)["warnings"]
    assert any(
        "the store lacks 4 steps that were recorded before this ch" in text for text in warnings
    )
    with pytest.raises(OSError, match="is missing"):  # Resuming does not bring them back.
        HDF5Store.open(tmp_path / "run")
    store = HDF5Store.open(tmp_path / "run", missing="skip")
    assert [step.index for step in store] == [4, 5, 6, 7, 8]
    assert all(len(step.sample_ids) == 4 for step in store)


@pytest.mark.slow
def test_a_store_that_processes_cannot_share_raises_in_all(tmp_path):
    error = train(tmp_path, 2, fails=True, store="MemoryStore")
    assert "A `MemoryStore` cannot be written by 2 processes" in error


@pytest.mark.slow
def test_an_existing_run_raises_in_all_processes(tmp_path):
    train(tmp_path, 2)
    assert "already holds a recorded run" in train(tmp_path, 2, fails=True)
    train(tmp_path, 2, existing="replace", trainer={"max_epochs": 1})
    assert len(HDF5Store.open(tmp_path / "run")) == 3
