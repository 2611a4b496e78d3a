"""Queries of models under manual optimization: as under automatic optimization, without effects."""

import copy

import pytest
import torch
from lightning_models import Plain, loader, mlp, quiet_trainer, vectors
from torch.utils.data import DataLoader, default_collate

from tda_lightning import GradientRecorder, attribute
from tda_lightning.stores import MemoryStore

BATCH = vectors(5).tensors


class Manual(Plain):
    """Optimizes as Lightning's documentation shows, and returns what ``answer`` makes of it."""

    def __init__(self, net, answer):
        super().__init__(net)
        self.automatic_optimization = False
        self.answer = answer

    def configure_optimizers(self):
        optimizer = torch.optim.Adam(self.parameters(), lr=0.01)
        return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)]

    def training_step(self, batch, batch_idx):
        optimizer, scheduler = self.optimizers(), self.lr_schedulers()
        optimizer.zero_grad()
        loss = self.loss(self.net(batch[0]), batch[1])
        self.manual_backward(loss)
        self.clip_gradients(optimizer, gradient_clip_val=0.5)
        optimizer.step()
        scheduler.step()
        return self.answer(loss)


class InTwoParts(Manual):
    """Adds up the gradients of two halves of the loss."""

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        for part in (0.3, 0.7):
            self.manual_backward(part * self.loss(self.net(batch[0]), batch[1]))
        optimizer.step()


class WithClosure(Manual):
    """Passes its loss to the optimizer as a closure."""

    def training_step(self, batch, batch_idx):
        def closure():
            loss = self.loss(self.net(batch[0]), batch[1])
            self.optimizers().zero_grad()
            self.manual_backward(loss)
            return loss

        self.optimizers().step(closure=closure)


class ByTwo(Manual):
    """Trains each layer by another optimizer, and returns no loss."""

    def configure_optimizers(self):
        layers = [layer for layer in self.net if any(True for _ in layer.parameters())]
        return [torch.optim.SGD(layer.parameters(), lr=0.1) for layer in layers]

    def training_step(self, batch, batch_idx):
        for optimizer in self.optimizers():
            optimizer.zero_grad()
            self.manual_backward(self.loss(self.net(batch[0]), batch[1]))
            optimizer.step()


def recorded(model):
    store = MemoryStore()
    trainer = quiet_trainer(GradientRecorder(store), max_epochs=2)
    trainer.fit(model, loader(vectors()))
    return store, trainer


def state_of(model, trainer):
    grads = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    optimizers = [optimizer.state_dict() for optimizer in trainer.optimizers]
    schedulers = [config.scheduler.state_dict() for config in trainer.lr_scheduler_configs]
    return copy.deepcopy([model.state_dict(), grads, optimizers, schedulers, trainer.global_step])


def assert_same(one, other):
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other)
    elif isinstance(one, dict | list | tuple):
        keys = one if isinstance(one, dict) else range(len(one))
        assert len(one) == len(other)
        for key in keys:
            assert_same(one[key], other[key])
    else:
        assert one == other


MODELS = {
    "returns its loss": lambda net: Manual(net, lambda loss: loss),
    "returns nothing": lambda net: Manual(net, lambda loss: None),
    "returns a detached loss": lambda net: Manual(net, lambda loss: {"loss": loss.detach()}),
    "two parts": lambda net: InTwoParts(net, None),
    "closure": lambda net: WithClosure(net, None),
}


@pytest.mark.parametrize("create", MODELS.values(), ids=MODELS)
def test_scores_are_those_of_the_loss_and_nothing_changes(create):
    model = create(mlp())
    store, trainer = recorded(model)
    before = state_of(model, trainer)
    scores = attribute(store, model, BATCH, progress=False)
    assert_same(state_of(model, trainer), before)
    automatic = Plain(copy.deepcopy(model.net))
    expected = attribute(store, automatic, BATCH, progress=False)
    torch.testing.assert_close(scores.values, expected.values)


def test_a_loaded_model_needs_no_trainer():
    model = Manual(mlp(), lambda loss: None)
    store, _ = recorded(model)
    scores = attribute(store, model, BATCH, progress=False)
    loaded = Manual(mlp(), lambda loss: None)
    loaded.load_state_dict(model.state_dict())
    assert torch.equal(attribute(store, loaded, BATCH, progress=False).values, scores.values)


def test_losses_of_several_optimizers_must_be_returned():
    model = ByTwo(mlp(), None)
    store, _ = recorded(model)
    with pytest.raises(ValueError, match=r"^`training_step` has 3 losses for 3 optimizers"):
        attribute(store, model, BATCH, progress=False)


class Changes(Plain):
    """Changes its batch in place, as many steps do."""

    def training_step(self, batch, batch_idx):
        labels = batch.pop("labels")
        return self.loss(self.net(batch["x"].mul_(0.5)), labels)


def test_a_step_that_changes_its_batch_leaves_the_query_alone():
    x, labels = BATCH
    data = [{"x": x[i], "labels": labels[i]} for i in range(5)]
    model, store = Changes(mlp()), MemoryStore()
    recorder = GradientRecorder(store, snapshots=[0, 1])
    loop = DataLoader(data, batch_size=2, collate_fn=default_collate)
    quiet_trainer(recorder, max_epochs=1).fit(model, loop)
    batch = {"x": x.clone(), "labels": labels}
    scores = attribute(store, model, batch, at="snapshots", progress=False)
    assert torch.equal(batch["x"], x)
    fresh = DataLoader(data, batch_size=5, collate_fn=default_collate)
    expected = attribute(store, model, fresh, at="snapshots", progress=False)
    torch.testing.assert_close(scores.values, expected.values)


class AssignedLater(Plain):
    def training_step(self, batch, batch_idx):
        return self.scale * self.loss(self.net(batch[0]), batch[1])


def test_an_attribute_of_the_fitted_model_alone_is_named():
    model, store = AssignedLater(mlp()), MemoryStore()
    model.scale = 2.0
    quiet_trainer(GradientRecorder(store), max_epochs=1).fit(model, loader(vectors()))
    loaded = AssignedLater(mlp())
    loaded.load_state_dict(model.state_dict())
    with pytest.raises(ValueError, match=r"attribute 'scale'.*Assign it here too"):
        attribute(store, loaded, BATCH, progress=False)
