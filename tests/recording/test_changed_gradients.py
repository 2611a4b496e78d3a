"""Gradients that are changed before the step, not all by one factor, and optimizers out of sight.

Each would give rows of other gradients than those that the optimizer has used.
"""

import warnings

import pytest
import torch
from lightning_models import AppliedGradientsLog, Plain, loader, mlp, quiet_trainer, vectors
from torch import nn

from tda_lightning import GradientRecorder, Identity
from tda_lightning.stores import MemoryStore


def train(model, **settings):
    """Train, and return the run, the applied gradients and the recorder's warnings."""
    store, log = MemoryStore(), AppliedGradientsLog()
    recorder = GradientRecorder(store, projector=Identity(), preconditioner="none")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        quiet_trainer(recorder, log, **settings).fit(model, loader(vectors(), shuffle=False))
    messages = [str(warning.message) for warning in caught]
    return store, log, [text for text in messages if "GradientRecorder" in text]


class ClippedByParameter(Plain):
    """Adaptive gradient clipping: each parameter's gradient is clipped by its own norm."""

    def on_before_optimizer_step(self, optimizer):
        for parameter in self.parameters():
            bound = 0.01 * parameter.detach().norm().clamp_min(0.1)
            parameter.grad.mul_((bound / parameter.grad.norm()).clamp_max(1))


class PartlyClipped(Plain):
    """Only the first layer is clipped."""

    def configure_gradient_clipping(self, optimizer, *_, **__):
        nn.utils.clip_grad_norm_(self.net[0].parameters(), 0.01)


class NormalizedInPlace(torch.optim.SGD):
    """Changes gradients in its step, as some optimizers do with weight decay."""

    def step(self, closure):
        loss = super().step(closure)
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.grad.div_(parameter.grad.norm())
        return loss


def test_what_an_optimizer_does_to_gradients_in_its_step_does_not_change_rows():
    torch.optim.SGD(mlp().parameters(), lr=0.1)  # From now on, hooks run in `super().step()`, too.
    model = Plain(mlp(), optimizer=lambda p: NormalizedInPlace(p, lr=0.1))
    runs = train(model, gradient_clip_val=0.5), train(Plain(mlp()), gradient_clip_val=0.5)
    assert runs[0][2] == runs[1][2] == []
    for step, plain in zip(runs[0][0], runs[1][0], strict=True):
        assert torch.equal(step.weights, plain.weights)
        assert torch.equal(step.sketch, plain.sketch)


class FrozenByZeros(Plain):
    """A layer is frozen in the first epoch by gradients of zero."""

    def on_before_optimizer_step(self, optimizer):
        if self.current_epoch == 0:
            self.net[0].weight.grad.zero_()


@pytest.mark.parametrize("model", [ClippedByParameter, PartlyClipped, FrozenByZeros])
def test_factors_that_differ_by_parameter_are_warned_of_once_and_averaged(model):
    store, log, messages = train(model(mlp()))
    (message,) = messages
    assert "and not all by one factor" in message
    for step, before, after in zip(store, log.gradients, log.applied, strict=True):
        pairs = [(before[name].double().norm(), after[name].double().norm()) for name in before]
        expected = sum(g * a for g, a in pairs) / sum(g * g for g, _ in pairs)
        weights = step.weights.double() * len(step.weights)
        assert weights.tolist() == pytest.approx([float(expected)] * len(weights), rel=1e-5)


def test_clipping_by_norm_and_a_plain_training_are_not_warned_of():
    for settings in ({}, {"gradient_clip_val": 0.05}, {"max_epochs": 7}):
        assert train(Plain(mlp()), **settings)[2] == []


class LatePenalty(Plain):
    """A penalty on a weight that starts after the first step."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return loss + (self.global_step > 2) * self.net[0].weight.square().sum()


class NeverZeroed(Plain):
    """Gradients add up over all steps."""

    def optimizer_zero_grad(self, *_):
        pass


@pytest.mark.parametrize("model", [LatePenalty, NeverZeroed])
def test_rows_that_do_not_sum_to_a_later_gradient_are_warned_of_once(model):
    (message,) = train(model(mlp()), max_epochs=7)[2]
    assert "do not sum to its gradient: in recorded step 4" in message


class GrowingScale(Plain):
    """The scale of the batch's loss belongs to no sample; its gradient grows."""

    def __init__(self):
        super().__init__(mlp())
        self.scale = nn.Parameter(torch.ones(1))

    def training_step(self, batch, batch_idx):
        factor = 1e-3 if self.global_step < 3 else 1e3
        return super().training_step(batch, batch_idx) * (1 + factor * (self.scale - 1)).sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-9)


def test_a_lost_parameter_whose_gradient_grows_is_warned_of_once():
    first, later = train(GrowingScale(), max_epochs=7)[2]
    assert "not recorded: GrowingScale `scale`" in first
    assert "of the squared gradient of recorded step 4 belongs" in later
    assert "above all to `scale`" in later


class Uncertainties(Plain):
    """Two losses with learned weights, as in multi-task learning."""

    def __init__(self):
        super().__init__(mlp())
        self.logs = nn.Parameter(torch.zeros(2))

    def training_step(self, batch, batch_idx):
        losses = super().training_step(batch, batch_idx), self.net(batch[0]).square().mean()
        return sum((-log).exp() * loss + log for log, loss in zip(self.logs, losses, strict=True))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-4)


def test_learned_weights_of_the_losses_of_a_batch_are_left_out_by_name():
    recorder = GradientRecorder(MemoryStore(), audit=1)
    with pytest.warns(UserWarning, match="`logs` .* it meets the loss of the whole batch"):
        quiet_trainer(recorder).fit(Uncertainties(), loader(vectors()))
    blocks = [block.name for block in recorder.store.recipe.blocks]
    for audit in recorder.store.audits():
        shares = dict(zip(blocks, audit.explained().tolist(), strict=True))
        assert min(share for name, share in shares.items() if name != "logs") > 0.999


class PartlyComplex(Plain):
    """The smallest parameter is complex."""

    def __init__(self):
        super().__init__(mlp())
        self.phase = nn.Parameter(0.01 * torch.ones(1, dtype=torch.complex64))

    def training_step(self, batch, batch_idx):
        x, y = batch
        return self.loss(self.net(x) + 0.01 * self.phase.abs() * x[:, :3], y)


def test_clipping_is_measured_beside_complex_parameters():
    store, log, _ = train(PartlyComplex(), gradient_clip_val=0.05)
    bias = "net.3.bias"
    pairs = zip(log.gradients, log.applied, store, strict=True)
    expected = [float(a[bias].norm() / b[bias].norm()) / len(s.weights) for b, a, s in pairs]
    assert [float(step.weights[0]) for step in store] == pytest.approx(expected, rel=1e-5)


class OptimizerReplaced(Plain):
    """Adam is replaced by SGD after the first epoch."""

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters())

    def on_train_epoch_start(self):
        if self.current_epoch == 1:
            self.trainer.optimizers = [torch.optim.SGD(self.parameters(), 0.1)]


def test_steps_of_a_new_optimizer_are_warned_of_once():
    store, _, messages = train(OptimizerReplaced(mlp()), max_epochs=3)
    assert len(store) == 3
    (message,) = messages
    assert "step 3 is taken by a new optimizer, SGD" in message


class TwoSteps(torch.optim.SGD):
    """Sharpness-aware minimization: its steps have other names."""

    def second_step(self):
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.data.sub_(parameter.grad, alpha=group["lr"])


class SharpnessAware(Plain):
    automatic_optimization = property(lambda self: False, lambda self, _: None)

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx))
        optimizer.second_step()


def test_a_training_without_a_step_that_lightning_sees_is_warned_of():
    model = SharpnessAware(mlp(), optimizer=lambda p: TwoSteps(p, lr=0.1))
    store, _, messages = train(model)
    assert len(store) == 0
    (message,) = messages
    assert "no step of the TwoSteps was seen" in message


def test_a_learning_rate_of_none_is_refused_with_a_remedy():
    def configure(parameters):
        optimizer = torch.optim.SGD(parameters, lr=0.1)
        optimizer.param_groups[0]["lr"] = None
        return optimizer

    with pytest.raises(ValueError, match=r"`lr=None` in the `SGD`.* Pass `lr=`"):
        train(Plain(mlp(), optimizer=configure))


class StateCleared(Plain):
    """The optimizer forgets its state in the second epoch."""

    def on_train_epoch_start(self):
        if self.current_epoch == 1:
            self.optimizers().state.clear()


def test_an_optimizer_whose_state_is_cleared_is_recorded():
    recorder = GradientRecorder(MemoryStore(), audit=1)
    model = StateCleared(mlp(), optimizer=lambda p: torch.optim.Adam(p, lr=0.01))
    quiet_trainer(recorder).fit(model, loader(vectors()))
    assert min(audit.explained_in_all() for audit in recorder.store.audits()) > 0.999
    assert [step.preconditioner is not None for step in recorder.store] == [True] * 6
