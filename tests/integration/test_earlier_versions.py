"""Open, query and resume a run that version 0.1.0 recorded.

The folder ``recorded_by_0_1`` was written by that version. It holds a run of 9 steps with snapshots
and rows of sampled labels, the checkpoint after step 6, the final weights, and the scores.
"""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning_models import Plain, loader, quiet_trainer, vectors
from torch import nn

from tda_lightning import (
    TRAK,
    GradientRecorder,
    GradientSimilarity,
    HDF5Store,
    InfluenceFunction,
    KroneckerCountSketch,
    Source,
    TracIn,
    Unrolled,
    attribute,
    self_influence,
)
from tda_lightning.attribution.dynamics.optimizer import Dynamics
from tda_lightning.recording.preconditioning import optimizer_preconditioner

RECORDED = Path(__file__).parent / "recorded_by_0_1"
METHODS = [TracIn(), InfluenceFunction(), TRAK(), Source(), GradientSimilarity()]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Copy the recorded folder and make the copy the working directory: its paths are relative."""
    shutil.copytree(RECORDED, tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    return tmp_path / "copy"


def untrained_model():
    torch.manual_seed(3)
    net = nn.Sequential(nn.Linear(7, 5), nn.ReLU(), nn.LayerNorm(5), nn.Linear(5, 3))
    return Plain(net, optimizer=lambda p: torch.optim.AdamW(p, lr=0.01))


def trained_model(folder):
    trained = untrained_model()
    trained.load_state_dict(torch.load(folder / "weights.pt", weights_only=True))
    return trained


def assert_near(values, expected):
    """Compare float32 scores of two builds: each is a sum over a few thousand products."""
    scale = np.abs(expected).max()
    np.testing.assert_allclose(np.asarray(values), expected, rtol=1e-3, atol=1e-4 * scale)


def test_an_earlier_run_opens_with_all_its_data(folder):
    run = HDF5Store.open("run")
    assert [step.index for step in run] == list(range(9))
    assert run.snapshots() == [0, 4, 8]
    assert run.train_ids().tolist() == list(range(13))
    assert all(step.curvature_rows is not None for step in run)
    assert len(run.audits()) == 3


@pytest.mark.parametrize("method", METHODS, ids=lambda method: type(method).__name__)
def test_an_earlier_run_gives_the_same_scores(folder, method):
    model, queries = trained_model(folder), vectors()[:3]
    scores = attribute("run", model, queries, method=method, at="now", progress=False)
    assert_near(scores.values, np.load("answers.npz")[type(method).__name__])


def test_an_earlier_run_gives_the_same_scores_by_the_earlier_limit_with_momentum(
    folder, monkeypatch
):
    model, queries = trained_model(folder), vectors()[:3]
    earlier = property(lambda step: step.lr * step.gradient_share / (1 - step.momentum) ** 0.5)
    monkeypatch.setattr(Dynamics, "effective_lr", earlier)
    scores = attribute("run", model, queries, method=Unrolled(), at="now", progress=False)
    assert_near(scores.values, np.load("answers.npz")["Unrolled"])


def test_an_earlier_run_gives_the_same_scores_at_snapshots(folder):
    scores = attribute(
        "run", trained_model(folder), vectors()[:3], method=TracIn(), at="snapshots", progress=False
    )
    assert_near(scores.values, np.load("answers.npz")["at snapshots"])


def test_an_earlier_run_gives_the_same_self_influence(folder):
    assert_near(
        self_influence("run", progress=False).values, np.load("answers.npz")["self-influence"]
    )


@pytest.mark.filterwarnings("ignore:Be aware that when using .ckpt_path.")
@pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint.*")
@pytest.mark.parametrize("are_rounded", [True, False])
def test_an_earlier_run_resumes_from_its_checkpoint(folder, monkeypatch, are_rounded):
    """Its rows are the same, but for the rounding of coordinates, which that version did not do."""
    if not are_rounded:
        monkeypatch.setattr(optimizer_preconditioner, "round_to_bits", lambda values: values)
    earlier_sketches = [step.sketch for step in HDF5Store.open("run")]
    recorder = GradientRecorder(
        "run",
        projector=KroneckerCountSketch(dimension=32),
        curvature="fisher",
        snapshots=4,
        audit=3,
    )
    trainer = quiet_trainer(recorder, max_epochs=3)

    trainer.fit(untrained_model(), loader(vectors(), shuffle=False), ckpt_path="step=6.ckpt")
    resumed = HDF5Store.open("run")
    assert [step.index for step in resumed] == list(range(9))
    for position, sketch in enumerate(earlier_sketches):
        if position < 6 or not are_rounded:
            assert_near(resumed[position].sketch, sketch.numpy())
        else:
            difference = (resumed[position].sketch - sketch).norm()
            assert 0 < difference < 2 / 2**5 * sketch.norm()
