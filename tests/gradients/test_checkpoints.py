"""Activation checkpoints of both kinds: exact rows, the same weights, and nothing left behind."""

import pytest
import torch
import torch.utils.checkpoint
from lightning_models import Plain, loader, quiet_trainer
from networks import data_of
from replayed import assert_rows_are_gradients
from torch import nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import CheckpointFunction, checkpoint

from tda_lightning import GradientRecorder, Identity
from tda_lightning.gradients.capture.plain_batches import run_plainly
from tda_lightning.stores import MemoryStore

T, D = 5, 6


class SequenceFirst(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(D, 7), nn.Tanh(), nn.Linear(7, D))

    def forward(self, x):
        return self.net(x.transpose(0, 1)).transpose(0, 1)


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.cells = nn.LSTM(D, D, batch_first=True)

    def forward(self, x):
        return x + self.cells(x)[0]


class Attending(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(D, 2)

    def forward(self, x):
        x = x.transpose(0, 1)
        return self.attention(x, x, x)[0].transpose(0, 1)


class Positions(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(T, D)

    def forward(self, x):
        return x + self.embedding(torch.arange(T))


class Normalized(nn.Module):
    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.rand(D))

    def forward(self, x):
        return x * x.pow(2).mean(-1, keepdim=True).rsqrt() * self.gain


class Bilinear(nn.Module):
    def __init__(self):
        super().__init__()
        self.product = nn.Bilinear(D, D, D)

    def forward(self, x):
        return self.product(x, x.tanh())


class BatchNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(D)

    def forward(self, x):
        return self.norm(x.mT).mT


def linear(parametrize):
    return lambda: parametrize(nn.Linear(D, D))


BLOCKS = {
    "sequence first": SequenceFirst,
    "recurrent": Recurrent,
    "attention": Attending,
    "positions": Positions,
    "squares": Normalized,
    "bilinear": Bilinear,
    "weight norm": linear(parametrizations.weight_norm),
    "orthogonal": linear(parametrizations.orthogonal),
}
CHANGING_BUFFERS = {
    "batch norm": BatchNorm,
    "spectral norm": linear(parametrizations.spectral_norm),
}
KINDS = pytest.mark.parametrize("use_reentrant", [False, True], ids=["plain", "reentrant"])


class Around(nn.Module):
    """A block in a checkpoint, between a layer and a head."""

    def __init__(self, block, use_reentrant):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.block, self.head = nn.Linear(D, D), block(), nn.Linear(D, 3)
        self.use_reentrant = use_reentrant

    def forward(self, x):
        hidden = self.first(x).tanh()
        if self.use_reentrant is None:
            hidden = self.block(hidden)
        else:
            hidden = checkpoint(self.block, hidden, use_reentrant=self.use_reentrant)
        return self.head(hidden.cumsum(dim=1).mean(dim=1))


def without_checkpoints(model):
    model.net.use_reentrant = None


@KINDS
@pytest.mark.parametrize("n", [3, T], ids=["three", "as many as positions"])
@pytest.mark.parametrize("block", BLOCKS.values(), ids=BLOCKS)
def test_rows_behind_checkpoints_are_gradients(block, n, use_reentrant):
    net = Around(block, use_reentrant).double()
    assert_rows_are_gradients(net, data_of((T, D)), n, reference=without_checkpoints)


def trained(block, use_reentrant, *callbacks):
    torch.manual_seed(1)
    model = Plain(Around(block, use_reentrant).double())
    quiet_trainer(*callbacks).fit(model, loader(data_of((T, D))))
    return model.state_dict()


@KINDS
@pytest.mark.parametrize(
    "block", (BLOCKS | CHANGING_BUFFERS).values(), ids=BLOCKS | CHANGING_BUFFERS
)
def test_weights_and_buffers_are_bit_identical(block, use_reentrant):
    expected = trained(block, use_reentrant)
    found = trained(block, use_reentrant, GradientRecorder(MemoryStore(), curvature="fisher"))
    for name, values in expected.items():
        assert torch.equal(values, found[name]), name


def test_both_kinds_record_the_same_sampled_labels():
    stores = []
    for use_reentrant in (False, True):
        stores.append(MemoryStore())
        recorder = GradientRecorder(stores[-1], projector=Identity(), curvature="fisher")
        trained(Recurrent, use_reentrant, recorder)
    for step, other in zip(*stores, strict=True):
        assert step.curvature_rows is not None
        torch.testing.assert_close(step.curvature_rows, other.curvature_rows)


class WithoutGradient(nn.Module):
    """A reentrant checkpoint of data alone, whose parameters torch leaves without a gradient."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.head = nn.Linear(D, D), nn.Linear(D, 3)

    def forward(self, x):
        return self.head(checkpoint(self.first, x.mean(dim=1), use_reentrant=True))


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True")
@pytest.mark.filterwarnings("ignore:GradientRecorder. no gradient")
def test_a_parameter_that_gets_no_gradient_still_gets_none():
    model = Plain(WithoutGradient().double())
    before = model.net.first.weight.detach().clone()
    quiet_trainer(GradientRecorder(MemoryStore())).fit(model, loader(data_of((T, D))))
    assert torch.equal(model.net.first.weight, before)


def test_contexts_that_end_in_any_order_leave_nothing_behind():
    first, second = run_plainly(is_compiled=False), run_plainly(is_compiled=False)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert torch.utils.checkpoint.CheckpointFunction is not CheckpointFunction
    second.__exit__(None, None, None)
    assert torch.utils.checkpoint.CheckpointFunction is CheckpointFunction
