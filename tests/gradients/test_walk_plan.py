"""Rows are right whatever the last graphs looked like; graphs that look alike are walked once."""

import weakref

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from tda_lightning import KroneckerCountSketch
from tda_lightning.gradients.capture import layout_memory
from tda_lightning.gradients.parameter_selection import select_parameters
from tda_lightning.gradients.row_recorder import RowRecorder

N, T, D = 5, 3, 7


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.wide, self.narrow = nn.LayerNorm(D), nn.Linear(D, 11), nn.Linear(11, D)

    def forward(self, x):
        return x + self.narrow(functional.gelu(self.wide(self.norm(x))))


class Blocks(nn.Module):
    """Four equal blocks, called by a function `way`."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList([Block() for _ in range(4)])
        self.head = nn.Linear(D, 4, bias=False)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.5)
        self.way = in_order

    def forward(self, x):
        return self.way(self, x).tanh().mean(dim=1)


def in_order(m, x):
    return m.head(m.blocks[3](m.blocks[2](m.blocks[1](m.blocks[0](x)))))


def backwards(m, x):
    return m.head(m.blocks[0](m.blocks[1](m.blocks[2](m.blocks[3](x)))))


def without_one(number):
    def way(m, x):
        for index, block in enumerate(m.blocks):
            x = x if index == number else block(x)
        return m.head(x)

    return way


def one_output_twice(m, x):
    x = m.blocks[0](x)
    return m.head(m.blocks[1](x) + m.blocks[2](x))


def two_outputs(m, x):
    return m.head(m.blocks[1](m.blocks[0](x)) + m.blocks[2](m.blocks[0](x)))


def chunks_swapped(m, x):
    first, second = m.blocks[0](x).chunk(2, dim=0 if len(x) % 2 == 0 else 2)
    x = torch.cat([second, first, x[..., : D - 2 * first.shape[-1]]], dim=-1)
    return m.head(m.blocks[1](x[..., :D]))


def checkpointed(m, x):
    for block in m.blocks:
        x = checkpoint(block, x, use_reentrant=False)
    return m.head(x)


def scaled_by(alpha):
    def way(m, x):
        wide, narrow = m.blocks[0].wide, m.blocks[0].narrow
        hidden = torch.addmm(wide.bias, x.flatten(0, 1), wide.weight.mT, alpha=alpha)
        return m.head(narrow(hidden).unflatten(0, x.shape[:2]))

    return way


def recorded_rows(recorder, model, x, y):
    recorder.start(len(x))
    loss = functional.cross_entropy(model(x), y)
    recorder.start_backward(loss)
    loss.backward()
    rows = recorder.end_backward().rows
    model.zero_grad()
    return rows


def single_rows(recorder, model, x, y):
    """Sketch the gradient of each sample's share of the loss, one after another."""
    rows = []
    for sample, label in zip(x, y, strict=True):
        loss = functional.cross_entropy(model(sample[None]), label[None]) / len(x)
        with recorder.paused():
            loss.backward()
        rows.append(recorder.sketch_gradient().sum(dim=0))
        model.zero_grad()
    return torch.stack(rows)


def batch(n=N, length=T, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, length, D, generator=generator, dtype=dtype)
    return x, torch.randint(4, (n,), generator=generator)


def recorder_of(model, dtype=torch.float64, width=3, dimension=61):
    projector = KroneckerCountSketch(dimension, width=width)
    return RowRecorder(model, select_parameters(model), {}, projector, dtype)


WAYS = {
    "other blocks of the same shape": [in_order, backwards, in_order, backwards],
    "one block less, each time another": [without_one(number) for number in (0, 2, 1, 2, 3)],
    "one node for two, and back": [two_outputs, one_output_twice, two_outputs],
    "checkpoints that come and go": [in_order, checkpointed, in_order, checkpointed],
    "a factor that changes": [scaled_by(1), scaled_by(2), scaled_by(1)],
}


@pytest.mark.parametrize("ways", WAYS.values(), ids=WAYS)
def test_rows_of_changing_graphs_are_single_gradients(ways):
    model = Blocks().double()
    with recorder_of(model) as recorder:
        for seed, way in enumerate(ways):
            model.way = way
            x, y = batch(seed=seed)
            rows = recorded_rows(recorder, model, x, y)
            assert torch.allclose(rows, single_rows(recorder, model, x, y), atol=1e-12)


@pytest.mark.parametrize("sizes", [[(5, 3), (3, 3), (5, 3)], [(5, 3), (5, 1), (5, 5), (5, 7)]])
def test_rows_of_batches_of_changing_sizes_are_single_gradients(sizes):
    model = Blocks().double()
    with recorder_of(model) as recorder:
        for n, length in sizes:
            x, y = batch(n, length)
            rows = recorded_rows(recorder, model, x, y)
            assert torch.allclose(rows, single_rows(recorder, model, x, y), atol=1e-12)


@pytest.mark.parametrize("width", [3, 5])
@pytest.mark.parametrize("length", [1, 3])
def test_rows_in_float32_are_single_gradients(width, length):
    model = Blocks()
    with recorder_of(model, torch.float32, width) as recorder:
        x, y = batch(length=length, dtype=torch.float32)
        rows = recorded_rows(recorder, model, x, y)
        assert torch.allclose(rows, single_rows(recorder, model, x, y), atol=1e-6)


def test_graphs_of_the_same_structure_are_walked_once(monkeypatch):
    model = Blocks().double()
    walks = []
    walk = layout_memory.walk
    monkeypatch.setattr(layout_memory, "walk", lambda *args: walks.append(1) or walk(*args))
    with recorder_of(model) as recorder:
        first = recorded_rows(recorder, model, *batch())
        n_walks = len(walks)
        for n in (5, 6, 13):
            recorded_rows(recorder, model, *batch(n, seed=n))
        again = recorded_rows(recorder, model, *batch())
    assert len(walks) == n_walks
    assert torch.equal(first, again)


class Token:
    """Something that a node of a graph holds."""


class Held(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, token):
        ctx.token = token
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad, None


def test_no_node_of_a_graph_is_held_after_its_backward_pass():
    model = Blocks().double()
    with recorder_of(model) as recorder:
        for seed in range(2):
            token = Token()
            model.way = lambda m, x, token=token: m.head(Held.apply(m.blocks[0](x), token))
            recorded_rows(recorder, model, *batch(seed=seed))
            model.way = in_order
            reference = weakref.ref(token)
            del token
            assert reference() is None
