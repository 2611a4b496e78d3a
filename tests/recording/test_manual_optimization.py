"""Manual optimization: every optimizer's step holds what its samples did to its own layers."""

import pytest
import pytorch_lightning as pl
import torch
from lightning_models import Telling, loader, quiet_trainer
from manual_models import Gan, Manual
from torch import nn
from torch.nn.functional import cross_entropy, softplus

from tda_lightning import GradientRecorder, Identity
from tda_lightning.stores import MemoryStore


class Accumulating(Manual):
    def one_batch(self, batch, batch_idx):
        optimizer = self.optimizers()
        losses = cross_entropy(self.net(batch[0]), batch[1], reduction="none")
        self.backward_from(losses, "net", scale=0.5)
        if batch_idx % 2:
            self.take_step(optimizer, "net")
            optimizer.zero_grad()


class TwoSteps(Manual):
    def one_batch(self, batch, batch_idx):
        for _ in range(2):
            super().one_batch(batch, batch_idx)


class TwoLossesOnOneGraph(Manual):
    def one_batch(self, batch, batch_idx):
        optimizer = self.optimizers()
        outputs = self.net(batch[0])
        optimizer.zero_grad(set_to_none=False)
        losses = cross_entropy(outputs, batch[1], reduction="none")
        self.backward_from(losses, "net", retain_graph=True)
        self.backward_from(outputs.square().mean(dim=1), "net")
        self.take_step(optimizer, "net")


class Clipped(Manual):
    def clip(self, optimizer):
        self.clip_gradients(optimizer, 0.05, "norm")

    def gradient(self):
        return torch.cat([one.grad.flatten() for one in self.net.parameters()])

    def one_batch(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.backward_from(cross_entropy(self.net(batch[0]), batch[1], reduction="none"), "net")
        before = self.gradient()
        self.clip(optimizer)
        self.take_step(optimizer, "net", float(before @ self.gradient() / before.square().sum()))


class ClippedByValue(Clipped):
    def clip(self, optimizer):
        self.clip_gradients(optimizer, 0.01, "value")


class ClippedThreeTimes(Clipped):
    def clip(self, optimizer):
        self.clip_gradients(optimizer, 0.2, "norm")
        self.clip_gradients(optimizer, 0.02, "value")
        self.clip_gradients(optimizer, 0.05, "norm")


class GanThatToggles(Gan):
    def one_batch(self, batch, batch_idx):
        makes, judges = self.optimizers()
        self.toggle_optimizer(makes)
        self.make(batch, makes)
        self.untoggle_optimizer(makes)
        self.toggle_optimizer(judges)
        self.decide(batch, judges)
        self.untoggle_optimizer(judges)


class GanThatZeroesLate(Gan):
    """Gradients of the other's pass linger until a step has been taken with them."""

    def one_batch(self, batch, batch_idx):
        makes, judges = self.optimizers()
        made = self.maker(batch[0])
        self.backward_from(softplus(-self.judge(made)[:, 0]), "maker", "judge")
        self.take_step(makes, "maker")
        makes.zero_grad()
        real = self.judge(batch[0])
        self.backward_from(softplus(-real)[:, 0], "judge")
        self.take_step(judges, "judge")
        self.zero_grad()


def record(model, **settings):
    store = MemoryStore()
    trainer = quiet_trainer(GradientRecorder(store, projector=Identity(), **settings))
    trainer.fit(model, loader(Telling()))
    return store


def columns_of(store, part):
    """Return the columns of a row that hold a part's parameters, as the part's own vector."""
    places, start = {}, 0
    for block in store.recipe.blocks:
        matrix = torch.arange(start, start + block.size).reshape(block.rows, block.columns)
        places[block.name] = torch.cat([matrix[:, :-1].flatten(), matrix[:, -1]])
        start += block.size
    return torch.cat([places[name] for name in places if name.split(".")[0] == part])


MODELS = [
    Manual,
    Accumulating,
    TwoSteps,
    TwoLossesOnOneGraph,
    Clipped,
    ClippedByValue,
    ClippedThreeTimes,
    Gan,
    GanThatToggles,
    GanThatZeroesLate,
]


by_every_model = pytest.mark.parametrize("model_type", MODELS)
may_bend = pytest.mark.filterwarnings("ignore:tda_lightning. clipping by value has bent")


@may_bend
@by_every_model
def test_rows_of_a_step_are_what_its_samples_did_to_its_layers(model_type):
    torch.manual_seed(3)
    model = model_type()
    store = record(model)
    assert len(store) == len(model.truth)
    for step, (part, ids, rows) in zip(store, model.truth, strict=True):
        assert step.sample_ids.tolist() == ids.tolist()
        assert step.lr == (0.2 if part == "judge" else 0.1)
        own = columns_of(store, part)
        torch.testing.assert_close(step.sketch[:, own], rows, rtol=1e-4, atol=1e-7)
        assert step.sketch.count_nonzero() == step.sketch[:, own].count_nonzero()
    assert [step.index for step in store] == list(range(len(store)))


def test_every_pass_through_one_graph_has_rows_of_sampled_labels():
    """And its own loss: cross-entropy first, squares of the outputs then."""
    store = MemoryStore()
    recorder = GradientRecorder(store, projector=Identity(), curvature="fisher")
    quiet_trainer(recorder, max_epochs=1).fit(TwoLossesOnOneGraph(), loader(Telling()))
    for step in store:
        n = len(step.sample_ids) // 2
        assert step.terms.round().tolist() == [1] * n + [3] * n
        norms = step.curvature_rows.norm(dim=1)
        assert step.curvature_rows.shape == step.sketch.shape
        assert bool((norms > 0).all())


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.SGD])
def test_two_optimizers_have_coordinates_of_their_own(optimizer):
    class Both(Gan):
        def configure_optimizers(self):
            return [
                torch.optim.Adam(self.maker.parameters(), lr=0.01),
                optimizer(self.judge.parameters(), lr=0.02),
            ]

    torch.manual_seed(3)
    model = Both()
    store = record(model, audit=1)
    assert all(float(one.explained().min()) > 0.999 for one in store.audits())
    for step, (part, _, _) in zip(store, model.truth, strict=True):
        own = columns_of(store, part)
        assert step.sketch.count_nonzero() == step.sketch[:, own].count_nonzero()
    assert store.preconditioner() is not None


def test_a_stride_counts_the_steps_of_each_optimizer():
    store = record(Gan(), every_n_steps=2)
    assert [step.index for step in store] == [0, 1, 4, 5, 8, 9]
    assert [step.lr for step in store] == [0.1, 0.2] * 3


class Sneaky(Manual):
    def backward_from(self, losses, *parts, **_):
        losses.mean().backward()

    def take_step(self, optimizer, part):
        optimizer.step()


class Forgetful(Manual):
    def one_batch(self, batch, batch_idx):
        losses = cross_entropy(self.net(batch[0]), batch[1], reduction="none")
        self.backward_from(losses, "net")
        self.take_step(self.optimizers(), "net")


class ClippedUnseen(Clipped):
    def clip(self, optimizer):
        nn.utils.clip_grad_value_(self.net.parameters(), 0.01)


class ClippedTooSoon(Manual):
    def one_batch(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        for _ in range(2):
            self.backward_from(cross_entropy(self.net(batch[0]), batch[1], reduction="none"), "net")
            self.clip_gradients(optimizer, 0.01, "value")
        self.take_step(optimizer, "net")


class Raw(Manual):
    def one_batch(self, batch, batch_idx):
        optimizer = self.optimizers(use_pl_optimizer=False)
        optimizer.zero_grad()
        self.backward_from(cross_entropy(self.net(batch[0]), batch[1], reduction="none"), "net")
        self.take_step(optimizer, "net")


@may_bend
@pytest.mark.parametrize(
    ("model_type", "message"),
    [
        (Sneaky, r"backward pass that Lightning has not seen.*manual_backward"),
        (Forgetful, r"not zeroed between two of its steps.*Call it"),
        (ClippedUnseen, r"not all by one factor.*self.clip_gradients"),
        (ClippedTooSoon, r"clipped by value before the last backward pass.*right before the step"),
        (Raw, r"step of an optimizer that Lightning has not seen.*self.optimizers\(\)"),
    ],
)
def test_what_cannot_be_told_is_refused(model_type, message):
    torch.manual_seed(5)
    with pytest.raises(ValueError, match=message):
        record(model_type())


def test_layers_that_nobody_trains_are_left_out():
    class Part(Manual):
        def __init__(self):
            super().__init__()
            self.idle = nn.Linear(3, 3)

    with pytest.warns(UserWarning, match="`idle` .12 parameters.: its parameters are in no opt"):
        store = record(Part())
    assert [block.name for block in store.recipe.blocks] == ["net.0", "net.2"]


def test_a_layer_of_two_optimizers_is_refused():
    class Split(Manual):
        def configure_optimizers(self):
            first, second = self.net[0], self.net[2]
            return [
                torch.optim.SGD([first.weight, second.weight, second.bias], lr=0.1),
                torch.optim.SGD([first.bias], lr=0.1),
            ]

        def one_batch(self, batch, batch_idx):
            pass

    with pytest.raises(ValueError, match=r"`net.0` are trained by several optimizers"):
        record(Split())


@may_bend
@by_every_model
def test_weights_are_bit_identical(model_type):
    def train(*callbacks):
        pl.seed_everything(3, verbose=False)
        model = model_type()
        quiet_trainer(*callbacks).fit(model, loader(Telling()))
        return model

    plain, recorded = train(), train(GradientRecorder(MemoryStore()))
    for one, other in zip(plain.parameters(), recorded.parameters(), strict=True):
        assert torch.equal(one, other)
