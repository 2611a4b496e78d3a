"""Sampled labels at a share of the steps: weights make up for the other steps."""

import pytest
import torch
from lightning_models import Plain, loader, quiet_trainer, vectors
from torch import nn
from torch.nn import functional
from torch.utils.data import TensorDataset

from tda_lightning import (
    GradientRecorder,
    HDF5Store,
    Identity,
    InfluenceFunction,
    Source,
    Unrolled,
    attribute,
)
from tda_lightning.attribution import SampledLabels
from tda_lightning.attribution.dynamics.curvature import applied_curvature
from tda_lightning.stores import MemoryStore

N = 13


def double_vectors():
    x, y = vectors(N).tensors
    return TensorDataset(x.double(), y)


def record(model, data, *, epochs, batch_size=N):
    store = MemoryStore()
    settings = {"curvature": "fisher", "curvature_share": 0.25}
    recorder = GradientRecorder(store, projector=Identity(), **settings)
    trainer = quiet_trainer(recorder, precision="64-true", max_epochs=epochs)
    trainer.fit(model, loader(data, batch_size, shuffle=False))
    return store


def frozen_sgd(p):
    """Return an optimizer that never moves: each step is another sample at the same weights."""
    return torch.optim.SGD(p, lr=0.0)


def small_net():
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(7, 2), nn.Tanh(), nn.Linear(2, 3)).double()


def test_a_share_of_the_steps_samples_labels_for_the_whole_batch():
    model = Plain(small_net(), optimizer=frozen_sgd)
    store = record(model, double_vectors(), epochs=16, batch_size=5)
    drawn = [len(step.curvature_rows) > 0 for step in store]
    assert all(drawn[:20])
    assert drawn[20:].count(True) == 7
    for step, is_drawn in zip(store, drawn, strict=True):
        assert len(step.curvature_rows) == is_drawn * len(step.sketch)


def test_a_drawn_step_stands_for_the_others():
    """Squared error of one output has no noise of labels: rows differ by their weight alone."""
    x = double_vectors().tensors[0]
    model = Plain(nn.Linear(7, 1).double(), loss=functional.mse_loss, optimizer=frozen_sgd)
    store = record(model, TensorDataset(x, x[:, :1]), epochs=60)
    curvatures = [step.curvature_rows.mT @ step.curvature_rows for step in store]
    later = sum(curvatures[20:]) / 40
    torch.testing.assert_close(later, curvatures[0])
    torch.testing.assert_close(applied_curvature(store, SampledLabels()), curvatures[0])


def test_a_resumed_training_samples_labels_at_the_same_steps(tmp_path):
    def train(store, epochs, resume=None):
        recorder = GradientRecorder(
            store, projector=Identity(), curvature="fisher", curvature_share=0.25, every_n_steps=2
        )
        model = Plain(small_net(), optimizer=lambda p: torch.optim.SGD(p, lr=0.1))
        trainer = quiet_trainer(recorder, precision="64-true", max_epochs=epochs)
        trainer.fit(model, loader(double_vectors(), 2, shuffle=False), ckpt_path=resume)
        trainer.save_checkpoint(tmp_path / "last.ckpt")
        return HDF5Store.open(store)

    expected = train(tmp_path / "whole", 9)
    train(tmp_path / "resumed", 5)
    resumed = train(tmp_path / "resumed", 9, tmp_path / "last.ckpt")
    assert 21 < len(expected) == len(resumed)
    for step, other in zip(expected, resumed, strict=True):
        torch.testing.assert_close(step.curvature_rows, other.curvature_rows)
    assert {len(step.curvature_rows) for step in resumed} >= {0, 2}


def test_methods_read_a_run_with_sampled_labels_at_a_share_of_its_steps():
    model, data = Plain(small_net()), double_vectors()
    store = record(model, data, epochs=16, batch_size=5)
    for method in (Unrolled(), Unrolled(SampledLabels()), InfluenceFunction(), Source()):
        scores = attribute(store, model, data[:3], method=method, progress=False)
        assert bool(scores.values.isfinite().all())
    undrawn = next(n for n, step in enumerate(store) if not len(step.curvature_rows))
    with pytest.raises(
        ValueError, match=r"these 1 steps, from step 2\d on, has no rows.*more steps"
    ):
        attribute(
            store[undrawn : undrawn + 1],
            model,
            data[:3],
            method=InfluenceFunction(),
            progress=False,
        )
