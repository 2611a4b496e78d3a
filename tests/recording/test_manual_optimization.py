"""Manual optimization: the rows of a step are its samples' gradients in its optimizer's layers."""

import pytest
import pytorch_lightning as pl
import torch
from lightning_models import IndexedVectors, loader, quiet_trainer
from manual_models import Gan, Manual
from torch import nn
from torch.nn.functional import cross_entropy, softplus

from tda_lightning import GradientRecorder, Identity
from tda_lightning.stores import MemoryStore


class Accumulating(Manual):
    def train_on(self, batch, batch_idx):
        optimizer = self.optimizers()
        losses = cross_entropy(self.net(batch[0]), batch[1], reduction="none")
        self.logged_backward(losses, "net", scale=0.5)
        if batch_idx % 2:
            self.take_step(optimizer, "net")
            optimizer.zero_grad()


class TwoSteps(Manual):
    def train_on(self, batch, batch_idx):
        for _ in range(2):
            super().train_on(batch, batch_idx)


class TwoLossesOnOneGraph(Manual):
    def train_on(self, batch, batch_idx):
        optimizer = self.optimizers()
        outputs = self.net(batch[0])
        optimizer.zero_grad(set_to_none=False)
        losses = cross_entropy(outputs, batch[1], reduction="none")
        self.logged_backward(losses, "net", retain_graph=True)
        self.logged_backward(outputs.square().mean(dim=1), "net")
        self.take_step(optimizer, "net")


class Clipped(Manual):
    def clip(self, optimizer):
        self.clip_gradients(optimizer, 0.05, "norm")

    def gradient(self):
        return torch.cat([p.grad.flatten() for p in self.net.parameters()])

    def train_on(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.logged_backward(cross_entropy(self.net(batch[0]), batch[1], reduction="none"), "net")
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
    def train_on(self, batch, batch_idx):
        generator_optimizer, discriminator_optimizer = self.optimizers()
        self.toggle_optimizer(generator_optimizer)
        self.train_generator(batch, generator_optimizer)
        self.untoggle_optimizer(generator_optimizer)
        self.toggle_optimizer(discriminator_optimizer)
        self.train_discriminator(batch, discriminator_optimizer)
        self.untoggle_optimizer(discriminator_optimizer)


class GanThatZeroesLate(Gan):
    """Gradients of the generator's pass stay in the discriminator until its optimizer steps."""

    def train_on(self, batch, batch_idx):
        generator_optimizer, discriminator_optimizer = self.optimizers()
        generated = self.generator(batch[0])
        self.logged_backward(
            softplus(-self.discriminator(generated)[:, 0]), "generator", "discriminator"
        )
        self.take_step(generator_optimizer, "generator")
        generator_optimizer.zero_grad()
        real = self.discriminator(batch[0])
        self.logged_backward(softplus(-real)[:, 0], "discriminator")
        self.take_step(discriminator_optimizer, "discriminator")
        self.zero_grad()


def record(model, **settings):
    store = MemoryStore()
    trainer = quiet_trainer(GradientRecorder(store, projector=Identity(), **settings))
    trainer.fit(model, loader(IndexedVectors()))
    return store


def columns_of(store, part):
    """Return the columns of a row that hold a part's parameters, in the order of the parameters."""
    places, start = {}, 0
    for block in store.recipe.blocks:
        places[block.name] = torch.arange(start, start + block.size)
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
ignore_clipping_warnings = pytest.mark.filterwarnings(
    "ignore:tda_lightning. clipping by value has changed"
)


@ignore_clipping_warnings
@by_every_model
def test_rows_of_a_step_are_the_gradients_of_its_samples(model_type):
    torch.manual_seed(3)
    model = model_type()
    store = record(model)
    assert len(store) == len(model.expected_steps)
    for step, (part, ids, rows) in zip(store, model.expected_steps, strict=True):
        assert step.sample_ids.tolist() == ids.tolist()
        assert step.lr == (0.2 if part == "discriminator" else 0.1)
        columns = columns_of(store, part)
        torch.testing.assert_close(step.sketch[:, columns], rows, rtol=1e-4, atol=1e-7)
        assert step.sketch.count_nonzero() == step.sketch[:, columns].count_nonzero()
    assert [step.index for step in store] == list(range(len(store)))


def test_every_pass_through_one_graph_has_rows_of_sampled_labels():
    """And the terms of its loss: first cross-entropy, then squares of the outputs."""
    store = MemoryStore()
    recorder = GradientRecorder(store, projector=Identity(), curvature="fisher")
    quiet_trainer(recorder, max_epochs=1).fit(TwoLossesOnOneGraph(), loader(IndexedVectors()))
    for step in store:
        n = len(step.sample_ids) // 2
        assert step.terms.round().tolist() == [1] * n + [3] * n
        norms = step.curvature_rows.norm(dim=1)
        assert step.curvature_rows.shape == step.sketch.shape
        assert bool((norms > 0).all())


@pytest.mark.parametrize("kind", [Gan, GanThatToggles])
@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.SGD])
def test_each_of_two_optimizers_has_its_coordinates(optimizer, kind):
    class Both(kind):
        def configure_optimizers(self):
            return [
                torch.optim.Adam(self.generator.parameters(), lr=0.01),
                optimizer(self.discriminator.parameters(), lr=0.02),
            ]

    torch.manual_seed(3)
    model = Both()
    store = record(model, audit=1)
    assert all(float(audit.explained().min()) > 0.999 for audit in store.audits())
    for step, (part, _, _) in zip(store, model.expected_steps, strict=True):
        columns = columns_of(store, part)
        assert step.sketch.count_nonzero() == step.sketch[:, columns].count_nonzero()
    assert store.preconditioner() is not None


def test_a_stride_counts_the_steps_of_each_optimizer():
    store = record(Gan(), every_n_steps=2)
    assert [step.index for step in store] == [0, 1, 4, 5, 8, 9]
    assert [step.lr for step in store] == [0.1, 0.2] * 3


class UnseenBackward(Manual):
    def logged_backward(self, losses, *parts, **_):
        losses.mean().backward()

    def take_step(self, optimizer, part):
        optimizer.step()


class NeverZeroed(Manual):
    def train_on(self, batch, batch_idx):
        losses = cross_entropy(self.net(batch[0]), batch[1], reduction="none")
        self.logged_backward(losses, "net")
        self.take_step(self.optimizers(), "net")


class ClippedUnseen(Clipped):
    def clip(self, optimizer):
        nn.utils.clip_grad_value_(self.net.parameters(), 0.01)


class ClippedTooSoon(Manual):
    def train_on(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        for _ in range(2):
            self.logged_backward(
                cross_entropy(self.net(batch[0]), batch[1], reduction="none"), "net"
            )
            self.clip_gradients(optimizer, 0.01, "value")
        self.take_step(optimizer, "net")


class UnseenOptimizer(Manual):
    def train_on(self, batch, batch_idx):
        optimizer = self.optimizers(use_pl_optimizer=False)
        optimizer.zero_grad()
        self.logged_backward(cross_entropy(self.net(batch[0]), batch[1], reduction="none"), "net")
        self.take_step(optimizer, "net")


@ignore_clipping_warnings
@pytest.mark.parametrize(
    ("model_type", "message"),
    [
        (UnseenBackward, r"backward pass that Lightning has not seen.*manual_backward"),
        (NeverZeroed, r"not zeroed between two of its steps.*Call it"),
        (ClippedUnseen, r"not all by one factor.*self.clip_gradients"),
        (ClippedTooSoon, r"clipped by value before the last backward pass.*right before the step"),
        (
            UnseenOptimizer,
            r"optimizer took a step that Lightning has not seen.*self.optimizers\(\)",
        ),
    ],
)
def test_steps_that_cannot_be_recorded_raise(model_type, message):
    torch.manual_seed(5)
    with pytest.raises(ValueError, match=message):
        record(model_type())


def test_layers_in_no_optimizer_are_left_out():
    class Part(Manual):
        def __init__(self):
            super().__init__()
            self.idle = nn.Linear(3, 3)

    with pytest.warns(UserWarning, match="`idle` .12 parameters.: its parameters are in no opt"):
        store = record(Part())
    names = [f"net.{number}.{kind}" for number in (0, 2) for kind in ("weight", "bias")]
    assert [block.name for block in store.recipe.blocks] == names


def test_a_layer_of_two_optimizers_has_rows_in_the_steps_of_both():
    class Split(Manual):
        def configure_optimizers(self):
            first, second = self.net[0], self.net[2]
            return [
                torch.optim.SGD([first.weight, second.weight, second.bias], lr=0.1),
                torch.optim.SGD([first.bias], lr=0.2),
            ]

        def train_on(self, batch, batch_idx):
            optimizers = self.optimizers()
            for optimizer in optimizers:
                optimizer.zero_grad()
            losses = cross_entropy(self.net(batch[0]), batch[1], reduction="none")
            self.logged_backward(losses, "net")
            self.expected_steps += [self.logged.pop()] * 2
            for optimizer in optimizers:
                optimizer.step()

    model = Split()
    store = record(model)
    is_first_bias = torch.arange(5 * 7 + 5 + 3 * 5 + 3) // 5 == 7
    assert len(store) == len(model.expected_steps) == 12
    for step, (_, ids, rows) in zip(store, model.expected_steps, strict=True):
        trained = ~is_first_bias if step.lr == 0.1 else is_first_bias
        assert step.sample_ids.tolist() == ids.tolist()
        torch.testing.assert_close(step.sketch, rows * trained, rtol=1e-4, atol=1e-7)
    assert [step.lr for step in store] == [0.1, 0.2] * 6


@ignore_clipping_warnings
@by_every_model
def test_weights_are_bit_identical(model_type):
    def train(*callbacks):
        pl.seed_everything(3, verbose=False)
        model = model_type()
        quiet_trainer(*callbacks).fit(model, loader(IndexedVectors()))
        return model

    plain, recorded = train(), train(GradientRecorder(MemoryStore()))
    for expected, actual in zip(plain.parameters(), recorded.parameters(), strict=True):
        assert torch.equal(actual, expected)
