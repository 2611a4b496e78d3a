"""Coordinates of young steps follow from the gradients of their only backward pass."""

import pytest
import torch
from lightning_models import Plain, loader, quiet_trainer
from networks import NETS, data_of
from torch.utils.data import TensorDataset

from tda_lightning import GradientRecorder, Identity, KroneckerCountSketch
from tda_lightning.gradients import row_sum
from tda_lightning.recording import step_builder
from tda_lightning.stores import MemoryStore

OPTIMIZERS = {
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1, betas=(0.8, 0.95)),
    "amsgrad": lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True),
    "NAdam": lambda p: torch.optim.NAdam(p, lr=0.01),
    "RAdam": lambda p: torch.optim.RAdam(p, lr=0.01),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.01),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.01),
}
NAMES = ("sequence", "layer norm", "called twice", "conv", "group norm", "tied weights", "lstm")
NAMES += (
    "attention",
    "checkpoint",
    "embedding",
    "weight norm",
    "frozen weight",
    "low-rank adapter",
)
SHRUNK = KroneckerCountSketch(29, width=2)


def data(shape):
    x, y = data_of(shape).tensors
    return TensorDataset(x.double() if x.is_floating_point() else x, y)


class TwoRates(Plain):
    def configure_optimizers(self):
        first, *rest = self.parameters()
        return torch.optim.AdamW([{"params": [first], "lr": 0.02}, {"params": rest}], lr=0.01)


def record(net="layer norm", optimizer="AdamW", kind=Plain, projector=SHRUNK, **settings):
    store = MemoryStore()
    make, shape = NETS[net]
    torch.manual_seed(0)
    model = kind(make().double(), optimizer=OPTIMIZERS[optimizer])
    curvature = settings.pop("curvature", "none")
    recorder = GradientRecorder(store, projector=projector, curvature=curvature)
    torch.manual_seed(1)
    quiet_trainer(recorder, precision="64-true", **settings).fit(model, loader(data(shape)))
    assert not any(getattr(p, "_post_accumulate_grad_hooks", None) for p in model.parameters())
    return store, model


def refuse(*arguments):
    pytest.fail("The gradient was computed by another pass.")


def assert_same_as_computed_first(monkeypatch, *arguments, **settings):
    with monkeypatch.context() as patch:
        patch.setattr(step_builder, "gradients_of", refuse)
        store, model = record(*arguments, **settings)
    with monkeypatch.context() as patch:
        patch.setattr(step_builder, "can_follow_gradients", lambda preconditioner: False)
        expected, expected_model = record(*arguments, **settings)
    for step, other in zip(store, expected, strict=True):
        torch.testing.assert_close(step.sketch, other.sketch, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(step.preconditioner.rows, other.preconditioner.rows)
        torch.testing.assert_close(step.preconditioner.columns, other.preconditioner.columns)
    for parameter, other in zip(model.parameters(), expected_model.parameters(), strict=True):
        assert torch.equal(parameter, other)


@pytest.mark.parametrize("name", NAMES)
def test_rows_are_those_of_a_gradient_that_is_computed_first(monkeypatch, name):
    assert_same_as_computed_first(monkeypatch, name)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_this_holds_for_every_adaptive_optimizer(monkeypatch, name):
    assert_same_as_computed_first(monkeypatch, optimizer=name)


@pytest.mark.parametrize("projector", [SHRUNK, Identity()], ids=["shrunk", "whole"])
@pytest.mark.parametrize("name", ["sequence", "conv", "tied weights"])
def test_this_holds_for_large_nodes_that_wait_for_their_parameters(monkeypatch, name, projector):
    monkeypatch.setattr(row_sum, "_MAX_NUMBERS", 0)
    assert_same_as_computed_first(monkeypatch, name, projector=projector)


@pytest.mark.parametrize(
    "settings",
    [{"accumulate_grad_batches": 2}, {"gradient_clip_val": 0.01}, {"kind": TwoRates}],
    ids=["accumulated", "clipped", "two rates"],
)
def test_this_holds_whatever_becomes_of_the_gradient(monkeypatch, settings):
    assert_same_as_computed_first(monkeypatch, **settings)


def test_reentrant_checkpoints_are_recorded_under_adam():
    store, _ = record("reentrant checkpoint")
    expected, _ = record("checkpoint")
    for step, other in zip(store, expected, strict=True):
        torch.testing.assert_close(step.sketch, other.sketch, rtol=1e-10, atol=1e-12)


class ZerosGradients(Plain):
    def optimizer_zero_grad(self, epoch, batch_idx, optimizer):
        optimizer.zero_grad(set_to_none=False)


class HooksGradients(Plain):
    """Has hooks that may take each gradient away as soon as it is accumulated."""

    def on_train_start(self):
        self.handles = [
            parameter.register_post_accumulate_grad_hook(lambda p: None)
            for parameter in self.parameters()
        ]

    def on_train_end(self):
        for handle in self.handles:
            handle.remove()


@pytest.mark.parametrize(
    "settings",
    [{"kind": ZerosGradients}, {"kind": HooksGradients}, {"curvature": "fisher"}],
    ids=["gradients of zeros", "other hooks", "sampled labels"],
)
def test_the_gradient_is_computed_first_where_the_pass_does_not_show_it(monkeypatch, settings):
    calls = []
    gradients_of = step_builder.gradients_of
    counted = lambda *arguments: calls.append(1) or gradients_of(*arguments)  # noqa: E731
    monkeypatch.setattr(step_builder, "gradients_of", counted)
    store, _ = record(**settings)
    n_first = 1 if settings.get("kind") is ZerosGradients else 0
    assert len(calls) == len(store) - n_first
