"""Each recorded row equals its weight times ``vmap(grad)`` at that step's weights."""

from functools import partial

import pytest
import torch
from lightning_models import Diary, Plain, loader, quiet_trainer
from networks import NETS, SEQUENCE, TOKENS, VECTOR, Nested, Tokens, data_of
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional

from tda_lightning import GradientRecorder, Identity
from tda_lightning.gradients.layers import select_layers
from tda_lightning.passes.queries import record_queries
from tda_lightning.stores import MemoryStore


class SequenceFirst(nn.Module):
    """Samples on axis 1 inside, on axis 0 outside."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(7, 5), nn.LayerNorm(5))
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(x.transpose(0, -2)).mean(dim=0))


class Sometimes(nn.Module):
    """A layer, called by keyword, that takes part in every other step."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(7, 3)
        self.b = nn.Linear(7, 3)
        self.takes_part = True

    def forward(self, x: Tensor) -> Tensor:
        out = self.a(input=x)
        return out + self.b(x) if self.takes_part else out


class Alternate(Diary):
    def on_train_batch_start(self, trainer, module, batch, index):
        super().on_train_batch_start(trainer, module, batch, index)
        module.net.takes_part = index % 2 == 0


# vmap does not know what these call, so their reference is a loop over batches of one.
WITHOUT_VMAP = ("lstm", "gru", "checkpoint", "embedding bag", "weight norm")


def loop_of(gradient, in_dims):
    """Return what ``vmap`` would, one sample after the other."""

    def mapped(parameters, x, y):
        per_sample = [gradient(parameters, *one) for one in zip(x, y, strict=True)]
        return {name: torch.stack([one[name] for one in per_sample]) for name in parameters}

    return mapped


def autograd(loss):
    """Return the gradient function of ``loss`` by plain autograd."""

    def gradient(parameters, x, y):
        leaves = {name: value.clone().requires_grad_() for name, value in parameters.items()}
        found = torch.autograd.grad(loss(leaves, x, y), leaves.values(), allow_unused=True)
        pairs = zip(leaves.items(), found, strict=True)
        return {name: torch.zeros_like(v) if g is None else g for (name, v), g in pairs}

    return gradient


def reference_rows(model, weights, batch, blocks, mapping=vmap, differentiate=grad):
    """Return ``vmap(grad)`` of every sample's loss, laid out as the blocks say."""

    def loss(parameters, x, y):
        names = {name.removeprefix("net."): value for name, value in parameters.items()}
        return functional.cross_entropy(functional_call(model.net, names, (x[None],))[0], y)

    x, y = batch
    grads = mapping(differentiate(loss), in_dims=(None, 0, 0))(weights, x, y)
    matrices = []
    for block, (source, *_) in zip(blocks, select_layers(model).sources, strict=True):
        layout = source.rule.layout
        per_sample = [layout([grads[p][i] for p in block.parameters]) for i in range(len(x))]
        matrices.append(torch.stack(per_sample))
    return torch.cat([matrix.flatten(1) for matrix in matrices], dim=1)


@pytest.mark.parametrize("name", NETS)
def test_rows_are_weighted_per_sample_gradients(name):
    make, shape = NETS[name]
    torch.manual_seed(0)
    model = Plain(make().double())
    store, diary = MemoryStore(), Diary()
    trainer = quiet_trainer(GradientRecorder(store, projector=Identity()), diary)
    trainer.fit(model, loader(data_of(shape)))
    assert len(store) == 6
    model.net.use_reentrant = None  # The reference does not checkpoint.
    for step, weights, batch in zip(store, diary.weights, diary.batches, strict=True):
        route = (loop_of, autograd) if any(one in name for one in WITHOUT_VMAP) else (vmap, grad)
        reference = reference_rows(model, weights, batch, store.recipe.blocks, *route)
        expected = reference / len(batch[0])
        error = (step.sketch - expected).norm() / expected.norm()
        assert error < 1e-10
        torch.testing.assert_close(step.weights, torch.full((len(batch[0]),), 1 / len(batch[0])))


def test_samples_may_stand_on_another_axis():
    model, store, diary = Plain(SequenceFirst().double()), MemoryStore(), Diary()
    dims = {"net.encoder.*": 1}
    recorder = GradientRecorder(store, projector=Identity(), batch_dims=dims)
    quiet_trainer(recorder, diary, max_epochs=1).fit(model, loader(data_of(SEQUENCE), batch_size=3))
    expected = reference_rows(model, diary.weights[0], diary.batches[0], store.recipe.blocks) / 3
    torch.testing.assert_close(store[0].sketch, expected)
    with pytest.raises(ValueError, match=r"net.encoder.0.*batch of 3 samples.*batch_dims="):
        quiet_trainer(GradientRecorder(MemoryStore())).fit(model, loader(data_of(SEQUENCE), 3))


@pytest.mark.parametrize("norm", [nn.BatchNorm1d, nn.BatchNorm2d], ids=lambda norm: norm.__name__)
def test_batch_norm_is_recorded_as_the_batch_saw_it(norm):
    """Rows are gradients with respect to a copy of scale and shift for every sample."""
    shape = (5, 7, 2) if norm is nn.BatchNorm2d else (5,)
    net = nn.Sequential(norm(5), nn.Flatten(), nn.Linear(torch.zeros(shape).numel(), 3)).double()
    model, store, diary = Plain(net), MemoryStore(), Diary()
    recorder = GradientRecorder(store, projector=Identity())
    quiet_trainer(recorder, diary, max_epochs=1).fit(model, loader(data_of(shape)))
    (x, y), weights = diary.batches[0], diary.weights[0]
    normalized = functional.batch_norm(x, None, None, training=True)
    copies = [
        weights[f"net.0.{name}"].repeat(len(x), 1).requires_grad_() for name in ("weight", "bias")
    ]
    scale, shift = (one.reshape(len(x), 5, *[1] * (x.ndim - 2)) for one in copies)
    hidden = (normalized * scale + shift).flatten(1)
    outputs = functional.linear(hidden, weights["net.2.weight"], weights["net.2.bias"])
    expected = torch.autograd.grad(functional.cross_entropy(outputs, y), copies)
    torch.testing.assert_close(store[0].sketch[:, :10], torch.cat(expected, dim=1))


class Positions(Tokens):
    """Looks positions up once for all samples."""

    def __init__(self, place, add=torch.add):
        super().__init__(None)
        self.positions, self.place, self.add = nn.Embedding(11, 7), place, add

    def forward(self, tokens):
        found = self.add(self.embed(tokens), self.place(self.positions))
        return self.head(self.norm(found).mean(dim=-2))


PLACES = {
    "added": lambda embed: embed(torch.arange(11)),
    "with an axis": lambda embed: embed(torch.arange(11)[None]),
    "with an axis behind": lambda embed: embed(torch.arange(11)).unsqueeze(0),
    "scaled": lambda embed: 3 * embed(torch.arange(11)),
    "reversed": lambda embed: embed(torch.arange(11)).flip(0),
    "twice": lambda embed: embed(torch.arange(11)) + embed(torch.arange(11)).flip(0),
    "curved": lambda embed: embed(torch.arange(11)).softmax(-1) * embed(torch.arange(11)),
    "of one for all": lambda embed: embed(torch.zeros(1, dtype=torch.int64)).expand(11, 7),
}


@pytest.mark.parametrize("batch_size", [5, 6, 11], ids=["other", "one left over", "as many"])
@pytest.mark.parametrize("place", PLACES)
def test_positions_that_all_samples_share_are_recorded(place, batch_size):
    model = Plain(Positions(PLACES[place]).double())
    store, diary = MemoryStore(), Diary()
    recorder = GradientRecorder(store, projector=Identity(), curvature="fisher")
    quiet_trainer(recorder, diary).fit(model, loader(data_of(TOKENS), batch_size))
    for step, weights, batch in zip(store, diary.weights, diary.batches, strict=True):
        expected = reference_rows(model, weights, batch, store.recipe.blocks)
        torch.testing.assert_close(step.sketch, expected / len(batch[0]))
        assert step.curvature_rows.shape == step.sketch.shape


def test_subtracted_positions_are_recorded():
    model = Plain(Positions(PLACES["added"], partial(torch.sub, alpha=2)).double())
    store, diary = MemoryStore(), Diary()
    trainer = quiet_trainer(GradientRecorder(store, projector=Identity()), diary, max_epochs=1)
    trainer.fit(model, loader(data_of(TOKENS)))
    expected = reference_rows(model, diary.weights[0], diary.batches[0], store.recipe.blocks)
    torch.testing.assert_close(store[0].sketch, expected / 5)


def test_positions_that_are_not_added_are_refused():
    trainer = quiet_trainer(GradientRecorder(MemoryStore(), projector=Identity()))
    model = Plain(Positions(PLACES["added"], torch.mul).double())
    with pytest.raises(ValueError, match=r"`net.positions` gives.*goes into `MulBackward0`"):
        trainer.fit(model, loader(data_of(TOKENS)))


class Flattening(nn.Module):
    """Layers that see the tokens of all samples in a row; convolutions that see all frames."""

    def __init__(self):
        super().__init__()
        self.norm, self.body = nn.LayerNorm(7), nn.Linear(7, 5)
        self.frames = nn.Conv1d(1, 3, 2)
        self.head = nn.Linear(12, 3)

    def forward(self, x):
        n = len(x)
        tokens = self.body(self.norm(x.reshape(n * 11, 7))).tanh()
        frames = self.frames(tokens[:, None]).tanh()
        return self.head(frames.reshape(n, 11, 12).mean(dim=1))


@pytest.mark.parametrize("share", [1.0, 0.5])
def test_layers_that_see_the_batch_flattened_are_recorded(share):
    model = Plain(Flattening().double())
    store, diary = MemoryStore(), Diary()
    dims = {"net.body": "flattened", "net.norm": "flattened", "net.frames": "flattened"}
    recorder = GradientRecorder(
        store, projector=Identity(), batch_dims=dims, curvature="fisher", curvature_share=share
    )
    quiet_trainer(recorder, diary).fit(model, loader(data_of((11, 7))))
    for step, weights, batch in zip(store, diary.weights, diary.batches, strict=True):
        expected = reference_rows(model, weights, batch, store.recipe.blocks) / len(batch[0])
        torch.testing.assert_close(step.sketch, expected)
        assert len(step.curvature_rows) == max(1, round(share * len(batch[0])))
    found = record_queries(model, diary.batches[-1], like=store)
    assert found.shape == step.sketch.shape


def test_a_flattened_batch_that_is_none_is_refused():
    recorder = GradientRecorder(MemoryStore(), batch_dims={"net.head": "flattened"})

    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(7, 3)

        def forward(self, x):
            return self.head(torch.cat([x, x[:1]]))[: len(x)]

    with pytest.raises(ValueError, match=r"net.head.*expected as many rows for each"):
        quiet_trainer(recorder).fit(Plain(Odd().double()), loader(data_of(VECTOR)))


def test_outputs_that_depend_on_each_other_are_refused():
    recorder = GradientRecorder(MemoryStore(), projector=Identity())
    with pytest.raises(ValueError, match=r"Bare `net.bare` is not its gradient"):
        quiet_trainer(recorder).fit(Plain(Nested(entangled=True).double()), loader(data_of(VECTOR)))


def test_a_layer_skipped_in_a_step_contributes_nothing_to_it():
    model, store, diary = Plain(Sometimes().double()), MemoryStore(), Alternate()
    trainer = quiet_trainer(GradientRecorder(store, projector=Identity()), diary)
    trainer.fit(model, loader(data_of(VECTOR)))
    for number, step in enumerate(store):
        model.net.takes_part = number % 3 != 1
        weights, batch = diary.weights[number], diary.batches[number]
        expected = reference_rows(model, weights, batch, store.recipe.blocks) / len(batch[0])
        torch.testing.assert_close(step.sketch, expected)
        assert bool(step.sketch[:, 24:].any()) == model.net.takes_part


def test_a_sum_of_losses_has_weight_one():
    def summed(outputs, labels):
        return functional.cross_entropy(outputs, labels, reduction="sum")

    model = Plain(nn.Linear(7, 3).double(), loss=summed)
    store, diary = MemoryStore(), Diary()
    recorder = GradientRecorder(store, projector=Identity(), reduction="sum")
    quiet_trainer(recorder, diary, max_epochs=1).fit(model, loader(data_of(VECTOR)))
    expected = reference_rows(model, diary.weights[0], diary.batches[0], store.recipe.blocks)
    torch.testing.assert_close(store[0].sketch, expected)
    assert store[0].weights.tolist() == [1.0] * 5


def test_gradients_taken_inside_the_step_are_not_mistaken_for_the_loss():
    class Penalised(Plain):
        def training_step(self, batch, batch_idx):
            x, y = batch
            x = x.clone().requires_grad_()
            (torch.autograd.grad(self.net(x).sum(), x))
            return self.loss(self.net(x), y)

    model = Penalised(nn.Sequential(nn.Linear(7, 11), nn.Tanh(), nn.Linear(11, 3)).double())
    store, diary = MemoryStore(), Diary()
    recorder = GradientRecorder(store, projector=Identity())
    quiet_trainer(recorder, diary, max_epochs=1).fit(model, loader(data_of(VECTOR)))
    expected = reference_rows(model, diary.weights[0], diary.batches[0], store.recipe.blocks) / 5
    torch.testing.assert_close(store[0].sketch, expected)
