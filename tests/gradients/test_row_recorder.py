"""Each recorded row is the weighted per-sample gradient, ``vmap(grad)`` at the step's weights."""

from functools import partial

import pytest
import torch
from lightning_models import Plain, TrainingLog, loader, quiet_trainer
from networks import NETS, SEQUENCE, TOKENS, VECTOR, Nested, Tokens, data_of
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional

from tda_lightning import GradientRecorder, Identity
from tda_lightning.gradients.sketching.block_maps import lay_out
from tda_lightning.passes.queries import record_queries
from tda_lightning.stores import MemoryStore


class SequenceFirst(nn.Module):
    """Has the samples on axis 1 inside the encoder, on axis 0 elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(7, 5), nn.LayerNorm(5))
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(x.transpose(0, -2)).mean(dim=0))


class OptionalLayer(nn.Module):
    """Calls its first layer by keyword, and its second only where ``uses_b`` is set."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(7, 3)
        self.b = nn.Linear(7, 3)
        self.uses_b = True

    def forward(self, x: Tensor) -> Tensor:
        out = self.a(input=x)
        return out + self.b(x) if self.uses_b else out


class AlternatingLog(TrainingLog):
    def on_train_batch_start(self, trainer, module, batch, index):
        super().on_train_batch_start(trainer, module, batch, index)
        module.net.uses_b = index % 2 == 0


# These use operations without vmap support, so their reference is a loop over single samples.
WITHOUT_VMAP = ("lstm", "gru", "checkpoint", "embedding bag", "weight norm")


def vmap_by_loop(gradient, in_dims):
    """Map ``gradient`` over the samples like ``vmap``, but in a loop."""

    def mapped(parameters, x, y):
        per_sample = [gradient(parameters, *sample) for sample in zip(x, y, strict=True)]
        return {name: torch.stack([grads[name] for grads in per_sample]) for name in parameters}

    return mapped


def grad_by_autograd(loss):
    """Return the gradient function of ``loss``, like ``grad`` but with plain autograd."""

    def gradient(parameters, x, y):
        leaves = {name: value.clone().requires_grad_() for name, value in parameters.items()}
        grads = torch.autograd.grad(loss(leaves, x, y), leaves.values(), allow_unused=True)
        pairs = zip(leaves.items(), grads, strict=True)
        return {name: torch.zeros_like(v) if g is None else g for (name, v), g in pairs}

    return gradient


def reference_rows(model, weights, batch, blocks, mapping=vmap, differentiate=grad):
    """Return ``vmap(grad)`` of every sample's loss, in the layout of the blocks."""

    def loss(parameters, x, y):
        names = {name.removeprefix("net."): value for name, value in parameters.items()}
        return functional.cross_entropy(functional_call(model.net, names, (x[None],))[0], y)

    x, y = batch
    grads = mapping(differentiate(loss), in_dims=(None, 0, 0))(weights, x, y)
    matrices = []
    for block in blocks:
        per_sample = [
            lay_out(block, [grads[p][i] for p in block.parameters]) for i in range(len(x))
        ]
        matrices.append(torch.stack(per_sample))
    return torch.cat([matrix.flatten(1) for matrix in matrices], dim=1)


# Instance norm subtracts the bias of the convolution in front of it.
@pytest.mark.filterwarnings("ignore:GradientRecorder. not recorded. Conv2d `net.0.bias`.*no effect")
@pytest.mark.parametrize("name", NETS)
def test_rows_are_weighted_per_sample_gradients(name):
    make, shape = NETS[name]
    torch.manual_seed(0)
    model = Plain(make().double())
    store, log = MemoryStore(), TrainingLog()
    trainer = quiet_trainer(GradientRecorder(store, projector=Identity()), log)
    trainer.fit(model, loader(data_of(shape)))
    assert len(store) == 6
    model.net.use_reentrant = None  # The reference runs without checkpointing.
    for step, weights, batch in zip(store, log.weights, log.batches, strict=True):
        is_looped = any(key in name for key in WITHOUT_VMAP)
        transforms = (vmap_by_loop, grad_by_autograd) if is_looped else (vmap, grad)
        reference = reference_rows(model, weights, batch, store.recipe.blocks, *transforms)
        expected = reference / len(batch[0])
        error = (step.sketch - expected).norm() / expected.norm()
        assert error < 1e-10
        torch.testing.assert_close(step.weights, torch.full((len(batch[0]),), 1 / len(batch[0])))


@pytest.mark.parametrize("batch_size", [3, 5], ids=["three", "as positions"])
@pytest.mark.parametrize("dims", [{}, {"net.encoder.*": 1}], ids=["inferred", "declared"])
def test_another_sample_axis_is_inferred_or_declared(dims, batch_size):
    model, store, log = Plain(SequenceFirst().double()), MemoryStore(), TrainingLog()
    recorder = GradientRecorder(store, projector=Identity(), batch_dims=dims)
    quiet_trainer(recorder, log, max_epochs=1).fit(model, loader(data_of(SEQUENCE), batch_size))
    for step, weights, batch in zip(store, log.weights, log.batches, strict=True):
        expected = reference_rows(model, weights, batch, store.recipe.blocks) / len(batch[0])
        torch.testing.assert_close(step.sketch, expected)


@pytest.mark.parametrize("norm", [nn.BatchNorm1d, nn.BatchNorm2d], ids=lambda norm: norm.__name__)
def test_batch_norm_is_recorded_with_batch_statistics(norm):
    """Rows are gradients with respect to separate copies of scale and shift per sample."""
    shape = (5, 7, 2) if norm is nn.BatchNorm2d else (5,)
    net = nn.Sequential(norm(5), nn.Flatten(), nn.Linear(torch.zeros(shape).numel(), 3)).double()
    model, store, log = Plain(net), MemoryStore(), TrainingLog()
    recorder = GradientRecorder(store, projector=Identity())
    quiet_trainer(recorder, log, max_epochs=1).fit(model, loader(data_of(shape)))
    (x, y), weights = log.batches[0], log.weights[0]
    normalized = functional.batch_norm(x, None, None, training=True)
    copies = [
        weights[f"net.0.{name}"].repeat(len(x), 1).requires_grad_() for name in ("weight", "bias")
    ]
    scale, shift = (copy.reshape(len(x), 5, *[1] * (x.ndim - 2)) for copy in copies)
    hidden = (normalized * scale + shift).flatten(1)
    outputs = functional.linear(hidden, weights["net.2.weight"], weights["net.2.bias"])
    expected = torch.autograd.grad(functional.cross_entropy(outputs, y), copies)
    torch.testing.assert_close(store[0].sketch[:, :10], torch.cat(expected, dim=1))


class Positions(Tokens):
    """Looks up positions once for all samples, and combines them with the embedded tokens."""

    def __init__(self, encode, combine=torch.add):
        super().__init__(None)
        self.positions, self.encode, self.combine = nn.Embedding(11, 7), encode, combine

    def forward(self, tokens):
        hidden = self.combine(self.embed(tokens), self.encode(self.positions))
        return self.head(self.norm(hidden).mean(dim=-2))


ENCODINGS = {
    "added": lambda embed: embed(torch.arange(11)),
    "with an axis of length one": lambda embed: embed(torch.arange(11)[None]),
    "unsqueezed": lambda embed: embed(torch.arange(11)).unsqueeze(0),
    "scaled": lambda embed: 3 * embed(torch.arange(11)),
    "reversed": lambda embed: embed(torch.arange(11)).flip(0),
    "added twice": lambda embed: embed(torch.arange(11)) + embed(torch.arange(11)).flip(0),
    "nonlinear": lambda embed: embed(torch.arange(11)).softmax(-1) * embed(torch.arange(11)),
    "one index for all positions": lambda embed: embed(torch.zeros(1, dtype=torch.int64)).expand(
        11, 7
    ),
}


@pytest.mark.parametrize(
    "batch_size", [5, 6, 11], ids=["ragged", "one left over", "as many as positions"]
)
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_positions_that_all_samples_share_are_recorded(encoding, batch_size):
    model = Plain(Positions(ENCODINGS[encoding]).double())
    store, log = MemoryStore(), TrainingLog()
    recorder = GradientRecorder(store, projector=Identity(), curvature="fisher")
    quiet_trainer(recorder, log).fit(model, loader(data_of(TOKENS), batch_size))
    for step, weights, batch in zip(store, log.weights, log.batches, strict=True):
        expected = reference_rows(model, weights, batch, store.recipe.blocks)
        torch.testing.assert_close(step.sketch, expected / len(batch[0]))
        assert step.curvature_rows.shape == step.sketch.shape


def test_subtracted_positions_are_recorded():
    model = Plain(Positions(ENCODINGS["added"], partial(torch.sub, alpha=2)).double())
    store, log = MemoryStore(), TrainingLog()
    trainer = quiet_trainer(GradientRecorder(store, projector=Identity()), log, max_epochs=1)
    trainer.fit(model, loader(data_of(TOKENS)))
    expected = reference_rows(model, log.weights[0], log.batches[0], store.recipe.blocks)
    torch.testing.assert_close(store[0].sketch, expected / 5)


@pytest.mark.parametrize("batch_size", [5, 11], ids=["ragged", "as many as positions"])
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_positions_that_are_multiplied_are_recorded(encoding, batch_size):
    model = Plain(Positions(ENCODINGS[encoding], torch.mul).double())
    store, log = MemoryStore(), TrainingLog()
    trainer = quiet_trainer(GradientRecorder(store, projector=Identity()), log)
    trainer.fit(model, loader(data_of(TOKENS), batch_size))
    for step, weights, batch in zip(store, log.weights, log.batches, strict=True):
        expected = reference_rows(model, weights, batch, store.recipe.blocks)
        torch.testing.assert_close(step.sketch, expected / len(batch[0]))


class Flattening(nn.Module):
    """Joins the samples with another axis in front of linear, norm and convolution layers."""

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


FLATTENED = {"net.body": "flattened", "net.norm": "flattened", "net.frames": "flattened"}


@pytest.mark.parametrize("dims", [{}, FLATTENED], ids=["inferred", "declared"])
def test_layers_with_flattened_inputs_are_recorded(dims):
    model = Plain(Flattening().double())
    store, log = MemoryStore(), TrainingLog()
    recorder = GradientRecorder(store, projector=Identity(), batch_dims=dims, curvature="fisher")
    quiet_trainer(recorder, log).fit(model, loader(data_of((11, 7))))
    for step, weights, batch in zip(store, log.weights, log.batches, strict=True):
        expected = reference_rows(model, weights, batch, store.recipe.blocks) / len(batch[0])
        torch.testing.assert_close(step.sketch, expected)
        assert len(step.curvature_rows) == len(batch[0])
    queries = record_queries(model, log.batches[-1], like=store)
    assert queries.shape == step.sketch.shape


def test_layer_outputs_that_depend_on_each_other_are_recorded():
    model, store, log = Plain(Nested(entangled=True).double()), MemoryStore(), TrainingLog()
    trainer = quiet_trainer(GradientRecorder(store, projector=Identity()), log)
    trainer.fit(model, loader(data_of(VECTOR)))
    for step, weights, batch in zip(store, log.weights, log.batches, strict=True):
        expected = reference_rows(model, weights, batch, store.recipe.blocks) / len(batch[0])
        torch.testing.assert_close(step.sketch, expected)


def test_a_layer_skipped_in_a_step_has_zero_rows():
    model, store, log = Plain(OptionalLayer().double()), MemoryStore(), AlternatingLog()
    trainer = quiet_trainer(GradientRecorder(store, projector=Identity()), log)
    trainer.fit(model, loader(data_of(VECTOR)))
    for number, step in enumerate(store):
        model.net.uses_b = number % 3 != 1
        weights, batch = log.weights[number], log.batches[number]
        expected = reference_rows(model, weights, batch, store.recipe.blocks) / len(batch[0])
        torch.testing.assert_close(step.sketch, expected)
        assert bool(step.sketch[:, 24:].any()) == model.net.uses_b


def test_a_sum_of_losses_has_weight_one():
    def summed(outputs, labels):
        return functional.cross_entropy(outputs, labels, reduction="sum")

    model = Plain(nn.Linear(7, 3).double(), loss=summed)
    store, log = MemoryStore(), TrainingLog()
    recorder = GradientRecorder(store, projector=Identity(), reduction="sum")
    quiet_trainer(recorder, log, max_epochs=1).fit(model, loader(data_of(VECTOR)))
    expected = reference_rows(model, log.weights[0], log.batches[0], store.recipe.blocks)
    torch.testing.assert_close(store[0].sketch, expected)
    assert store[0].weights.tolist() == [1.0] * 5


def test_gradients_computed_inside_the_step_are_not_recorded():
    class WithInputGradient(Plain):
        def training_step(self, batch, batch_idx):
            x, y = batch
            x = x.clone().requires_grad_()
            torch.autograd.grad(self.net(x).sum(), x)
            return self.loss(self.net(x), y)

    model = WithInputGradient(nn.Sequential(nn.Linear(7, 11), nn.Tanh(), nn.Linear(11, 3)).double())
    store, log = MemoryStore(), TrainingLog()
    recorder = GradientRecorder(store, projector=Identity())
    quiet_trainer(recorder, log, max_epochs=1).fit(model, loader(data_of(VECTOR)))
    expected = reference_rows(model, log.weights[0], log.batches[0], store.recipe.blocks) / 5
    torch.testing.assert_close(store[0].sketch, expected)
