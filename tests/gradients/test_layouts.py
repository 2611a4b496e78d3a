"""Where the samples lie in a tensor is inferred and proved, without any help of the user."""

import pytest
import torch
from lightning_models import Plain, TrainingLog, mlp, quiet_trainer, vectors
from networks import data_of
from replayed import MeanOfLosses, assert_rows_are_gradients
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from tda_lightning import GradientRecorder, Identity
from tda_lightning.stores import MemoryStore

T, D = 6, 7


class Arranged(nn.Module):
    """Layers of several kinds between two rearrangements of a batch ``(n, T, D)``.

    Args:
        arrange: Rearranges the tokens.
        restore: From the rearranged tokens and the batch size back to ``(n, T, D)``.
    """

    def __init__(self, arrange, restore):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(D, 5), nn.LayerNorm(5), nn.Tanh(), nn.Linear(5, D))
        self.shift, self.head = nn.Parameter(torch.rand(D)), nn.Linear(D, 3)
        self.arrange, self.restore = arrange, restore

    def forward(self, x):
        hidden = self.body(self.arrange(x)) + self.shift
        return self.head(self.restore(hidden, len(x)).cumsum(dim=1).tanh().mean(dim=1))


ARRANGEMENTS = {
    "samples first": (lambda x: x, lambda h, n: h),
    "flattened": (lambda x: x.flatten(0, 1), lambda h, n: h.reshape(n, T, D)),
    "positions first": (lambda x: x.transpose(0, 1), lambda h, n: h.transpose(0, 1)),
    "positions first, flattened": (
        lambda x: x.transpose(0, 1).flatten(0, 1),
        lambda h, n: h.reshape(T, n, D).transpose(0, 1),
    ),
    "with an axis of length one": (lambda x: x[None], lambda h, n: h[0]),
    "windows of a sample": (lambda x: x.reshape(-1, 3, D), lambda h, n: h.reshape(n, T, D)),
    "windows of the batch": (
        lambda x: x.reshape(-1, 2, 3, D).transpose(0, 1).reshape(-1, 3, D),
        lambda h, n: h.reshape(2, n, 3, D).transpose(0, 1).reshape(n, T, D),
    ),
    "samples between other axes": (
        lambda x: x.reshape(-1, 2, 3, D).transpose(0, 1),
        lambda h, n: h.transpose(0, 1).reshape(n, T, D),
    ),
    "samples between other axes, flattened": (
        lambda x: x.reshape(-1, 2, 3, D).transpose(0, 1).reshape(-1, D),
        lambda h, n: h.reshape(2, n, 3, D).transpose(0, 1).reshape(n, T, D),
    ),
    "rolled": (lambda x: x.roll(2, dims=1), lambda h, n: h.roll(-2, dims=1)),
}


@pytest.mark.parametrize(
    "batch_size", [5, T, 12, D, 1], ids=["ragged", "T", "one left over", "D", "one"]
)
@pytest.mark.parametrize("name", ARRANGEMENTS)
def test_rows_of_any_arrangement_are_gradients(name, batch_size):
    model = Arranged(*ARRANGEMENTS[name]).double()
    assert_rows_are_gradients(model, data_of((T, D)), batch_size)


def test_sampled_labels_have_rows_in_any_arrangement():
    net = Arranged(*ARRANGEMENTS["positions first, flattened"]).double()
    store = assert_rows_are_gradients(net, data_of((T, D)), curvature="fisher")
    for step in store:
        assert len(step.curvature_rows) == len(step.sketch)
        assert bool((step.curvature_rows.norm(dim=1) > 0).all())


class Views(MeanOfLosses):
    """Classifies a sample by the encodings of two views of it."""

    def __init__(self, joined):
        torch.manual_seed(0)
        encoder = nn.Sequential(nn.Linear(D, 11), nn.LayerNorm(11), nn.Tanh(), nn.Linear(11, 3))
        super().__init__(encoder.double())
        self.joined = joined

    def losses(self, batch):
        x, y = batch
        first, second = self.joined(self.net, x, x.flip(-1) + 1)
        return functional.cross_entropy(first * second + first, y, reduction="none")


JOINED = {
    "one after the other": lambda net, a, b: net(torch.cat([a, b])).chunk(2),
    "side by side": lambda net, a, b: (
        net(torch.stack([a, b], dim=1).flatten(0, 1)).reshape(-1, 2, 3).unbind(1)
    ),
    "stacked in front": lambda net, a, b: net(torch.stack([a, b])).unbind(0),
    "two calls": lambda net, a, b: (net(a), net(b)),
    "repeated": lambda net, a, b: net(a.repeat(2, 1)).chunk(2),
    "interleaved": lambda net, a, b: net(a.repeat_interleave(2, dim=0)).reshape(-1, 2, 3).unbind(1),
}


@pytest.mark.parametrize("batch_size", [5, 3, 6, 1], ids=["ragged", "as classes", "even", "one"])
@pytest.mark.parametrize("name", JOINED)
def test_rows_of_two_views_belong_to_their_sample(name, batch_size):
    assert_rows_are_gradients(Views(JOINED[name]), data_of((D,)), batch_size)


class Table(nn.Module):
    """Tokens with a table of positions, or of pairs of positions, that all samples share."""

    def __init__(self, combine, *shape):
        super().__init__()
        torch.manual_seed(0)
        self.table, self.combine = nn.Parameter(torch.rand(*shape)), combine
        self.body, self.head = nn.Linear(D, D), nn.Linear(D, 3)

    def forward(self, x):
        hidden = self.combine(self.body(x), self.table)
        return self.head(hidden.tanh().cumsum(dim=1).mean(dim=1))


def biased_attention(x, table):
    return (x @ x.mT + table).softmax(dim=-1) @ x


TABLES = {
    "added": (torch.add, (T, D)),
    "multiplied": (torch.mul, (T, D)),
    "subtracted": (torch.sub, (1, T, D)),
    "of each position": (torch.mul, (T, 1)),
    "divided": (lambda x, table: x / (1 + table), (T, D)),
    "shortened": (lambda x, table: x + table[:T], (2 * T, D)),
    "gathered": (lambda x, table: x + table[torch.arange(T).flip(0)], (2 * T, D)),
    "of pairs": (biased_attention, (T, T)),
    "of relative positions": (
        lambda x, table: biased_attention(
            x, table[torch.arange(T)[:, None] - torch.arange(T) + T - 1]
        ),
        (2 * T - 1,),
    ),
    "a matrix over positions": (lambda x, table: table @ x, (T, T)),
    "nonlinear": (lambda x, table: x * table.softmax(dim=0), (T, D)),
}


@pytest.mark.parametrize("batch_size", [5, T, 12], ids=["ragged", "T", "one left over"])
@pytest.mark.parametrize("name", TABLES)
def test_tables_that_all_samples_share_are_recorded(name, batch_size):
    combine, shape = TABLES[name]
    assert_rows_are_gradients(Table(combine, *shape).double(), data_of((T, D)), batch_size)


def test_a_sample_keeps_a_row_that_is_almost_zero():
    """A layer norm of one active unit cancels that unit's gradient up to its `eps`."""
    x = torch.stack([10 * vectors()[0][0], 0.1 * vectors()[1][0]])
    y = torch.tensor([0, 2])
    model = Plain(mlp())
    with torch.no_grad():
        model.net[0].bias.fill_(-3.0)[5] = 3.0  # The only unit that the second sample activates.
    log, store = TrainingLog(), MemoryStore()
    data = DataLoader(TensorDataset(x, y), batch_size=2)
    quiet_trainer(GradientRecorder(store, projector=Identity()), log, max_epochs=1).fit(model, data)
    model.load_state_dict(log.weights[0])
    weight = model.net[0].weight
    for sample in range(2):
        loss = functional.cross_entropy(model.net(x[sample][None]), y[sample][None]) / 2
        (expected,) = torch.autograd.grad(loss, weight)
        row = store[0].sketch[sample, : weight.numel()]
        torch.testing.assert_close(row, expected.flatten(), rtol=0.05, atol=1e-9)
    assert 0 < store[0].sketch[1, : weight.numel()].norm() < 1e-4


class Hinge(MeanOfLosses):
    """Samples with a negative first number have no loss."""

    def losses(self, batch):
        return super().losses(batch) * (batch[0][:, 0, 0] > 0)


def test_a_first_batch_in_which_one_sample_has_a_gradient_decides_nothing():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(6, 2, 8, 0.0, batch_first=True)
    net = nn.Sequential(layer, nn.Flatten(), nn.Linear(24, 3)).double()
    x, y = torch.randn(14, 4, 6).double(), torch.randint(3, (14,))
    x[:, 0, 0] = x[:, 0, 0].abs()
    x[10, 0, 0] *= -1  # One of the first two samples.
    store = assert_rows_are_gradients(Hinge(net), TensorDataset(x, y), 2)
    assert int((store[0].sketch.norm(dim=1) > 0).sum()) == 1
