"""An error of the recorder in one of two processes ends the recording of both, not the training."""

import json

import pytest
from ddp_processes import result_of, train

from tda_lightning import HDF5Store

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("ddp")]

LONG = {"trainer": {"max_epochs": 20}, "audit": 0}
ADAMW = {**LONG, "optimizer": "AdamW"}
ACCUMULATED = {**LONG, "trainer": {"max_epochs": 40, "accumulate_grad_batches": 2}}
GAN = {**LONG, "gan": True, "strategy": "ddp_find_unused_parameters_true"}
# Of each training: what goes wrong, and how many steps both processes have recorded.
STOPPED = {
    "the first": ({**LONG, "faulty": [0, 31]}, 31),
    "the second": ({**LONG, "faulty": [1, 31]}, 31),
    "with checkpoints": ({**ADAMW, "faulty": [1, 31], "checkpoint": 10, "snapshots": 10}, 31),
    "accumulating": ({**ACCUMULATED, "faulty": [1, 62]}, 41),
    "the store": ({**ADAMW, "store": "FailingStore", "checkpoint": 4}, 4),
    "reset": ({**ADAMW, "faulty": [1, 31], "resets": [40, 50]}, 31),
    "reset before": ({**ADAMW, "faulty": [1, 52], "resets": [30]}, 52),
    "GAN": ({**GAN, "faulty": [1, 31]}, 62),
}


def settings_without(settings, *names):
    return {name: value for name, value in settings.items() if name not in names}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    plain = {
        f"plain {name}": {**settings_without(settings, "checkpoint"), "record": False}
        for name, (settings, _) in STOPPED.items()
    }
    recorded = {name: settings for name, (settings, _) in STOPPED.items()}
    train(folder, *recorded.items(), *plain.items())
    return folder


@pytest.mark.parametrize("name", STOPPED)
def test_a_late_error_in_one_process_stops_the_recording_of_all(trained, name):
    folder, (_, steps) = trained / name, STOPPED[name]
    result = result_of(folder)
    assert result["weights"] == result_of(trained / f"plain {name}")["weights"]
    assert result["read"] == steps
    run = HDF5Store.open(folder / "run")
    assert [step.index for step in run] == list(range(steps))
    assert all(len(step.sample_ids) in (4, 8) for step in run)
    assert run.final_fingerprint is None
    texts = [json.loads((folder / f"warnings-{rank}.json").read_text()) for rank in (0, 1)]
    ours = [[text for text in part if "GradientRecorder" in text] for part in texts]
    assert sorted(map(len, ours)) == [0, 1]


def test_an_error_while_audits_lie_ahead_ends_the_training(tmp_path):
    audited = {**LONG, "audit": 1, "faulty": [1, 31]}
    train(tmp_path, ("audited", audited), fails=True)
    assert len(HDF5Store.open(tmp_path / "audited" / "run")) <= 31
