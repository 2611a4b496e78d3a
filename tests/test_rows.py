"""Each recorded row equals its weight times ``vmap(grad)`` at that step's weights."""

import pytest
import torch
from lightning_models import Diary, Plain, loader, quiet_trainer
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional
from torch.utils.data import TensorDataset

from tda_lightning import GradientRecorder, Identity, MemoryStore
from tda_lightning.layers import find_rule


class Twice(nn.Module):
    """One layer called twice, with an in-place activation behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(7, 7)
        self.head = nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = functional.relu_(self.inner(x))
        return self.head(functional.relu_(self.inner(hidden)))


class Tokens(nn.Module):
    """Embedded tokens, normalised, pooled; token 2 is padding."""

    def __init__(self, padding_idx: int | None) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 7, padding_idx=padding_idx)
        self.norm = nn.LayerNorm(7)
        self.head = nn.Linear(7, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.norm(self.embed(tokens)).tanh().mean(dim=-2))


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


def frozen(module: nn.Module, *names: str) -> nn.Module:
    for name in names:
        module.get_parameter(name).requires_grad_(False)
    return module


def convolution(**settings):
    conv = nn.Conv2d(2, 5, **{"kernel_size": 3, **settings})
    width = conv(torch.zeros(1, 2, 7, 11)).numel()
    return nn.Sequential(conv, nn.ReLU(inplace=True), nn.Flatten(-3), nn.Linear(width, 3))


VECTOR, IMAGE, TOKENS, SEQUENCE = (7,), (2, 7, 11), "tokens", (5, 7)
NETS = {
    "linear": (lambda: nn.Linear(7, 3), VECTOR),
    "linear without bias": (lambda: nn.Linear(7, 3, bias=False), VECTOR),
    "in-place relu": (
        lambda: nn.Sequential(nn.Linear(7, 11), nn.ReLU(inplace=True), nn.Linear(11, 3)),
        VECTOR,
    ),
    "called twice": (Twice, VECTOR),
    "sequence": (
        lambda: nn.Sequential(nn.Linear(7, 11), nn.Tanh(), nn.Flatten(-2), nn.Linear(55, 3)),
        SEQUENCE,
    ),
    "layer norm": (
        lambda: nn.Sequential(nn.Linear(7, 5), nn.LayerNorm(5), nn.Linear(5, 3)),
        VECTOR,
    ),
    "layer norm over two axes": (
        lambda: nn.Sequential(nn.LayerNorm((5, 7)), nn.Flatten(-2), nn.Linear(35, 3)),
        SEQUENCE,
    ),
    "layer norm without bias": (
        lambda: nn.Sequential(nn.LayerNorm(7, bias=False), nn.Linear(7, 3)),
        VECTOR,
    ),
    "conv": (convolution, IMAGE),
    "conv, stride, dilation and padding": (
        lambda: convolution(stride=(2, 3), padding=(1, 2), dilation=(2, 1)),
        IMAGE,
    ),
    "conv, same padding": (lambda: convolution(padding="same", kernel_size=(3, 5)), IMAGE),
    "conv, circular padding": (lambda: convolution(padding=1, padding_mode="circular"), IMAGE),
    "conv without bias": (lambda: convolution(bias=False), IMAGE),
    "embedding": (lambda: Tokens(None), TOKENS),
    "embedding with padding": (lambda: Tokens(2), TOKENS),
    "frozen weight": (lambda: frozen(nn.Sequential(nn.Linear(7, 3)), "0.weight"), VECTOR),
    "frozen bias": (lambda: frozen(nn.Sequential(nn.Linear(7, 3)), "0.bias"), VECTOR),
    "frozen scale": (
        lambda: frozen(nn.Sequential(nn.LayerNorm(7), nn.Linear(7, 3)), "0.weight", "1.bias"),
        VECTOR,
    ),
}


def data_of(shape) -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(3, (13,), generator=generator)
    if shape == TOKENS:
        return TensorDataset(torch.randint(5, (13, 11), generator=generator), labels)
    return TensorDataset(torch.randn(13, *shape, generator=generator).double(), labels)


def reference_rows(model, weights, batch, blocks):
    """Return ``vmap(grad)`` of every sample's loss, laid out as the blocks say."""

    def loss(parameters, x, y):
        names = {name.removeprefix("net."): value for name, value in parameters.items()}
        return functional.cross_entropy(functional_call(model.net, names, x[None])[0], y)

    x, y = batch
    grads = vmap(grad(loss), in_dims=(None, 0, 0))(weights, x, y)
    matrices = []
    for block in blocks:
        layout = find_rule(model.get_submodule(block.name)).layout
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
    for step, weights, batch in zip(store, diary.weights, diary.batches, strict=True):
        expected = reference_rows(model, weights, batch, store.recipe.blocks) / len(batch[0])
        error = (step.sketch - expected).norm() / expected.norm()
        assert error < 1e-10
        torch.testing.assert_close(step.weights, torch.full((len(batch[0]),), 1 / len(batch[0])))


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
