"""Rows of parameters that meet samples in many kinds of operations equal single gradients."""

import pytest
import torch
from networks import data_of
from replayed import MeanOfLosses, assert_rows_are_gradients
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

T, D = 6, 7


class Sequences(nn.Module):
    """A function of some modules and of sequences ``(n, T, D)``, with a head over its mean."""

    def __init__(self, function, width=D, **parts):
        super().__init__()
        torch.manual_seed(0)
        self.function = function
        for name, part in parts.items():
            is_shape = isinstance(part, tuple)
            setattr(self, name, nn.Parameter(torch.randn(part) / 3) if is_shape else part())
        self.body, self.head = nn.Linear(D, D), nn.Linear(width, 3)

    def forward(self, x):
        hidden = self.function(self, self.body(x))
        return self.head(hidden.tanh().cumsum(dim=1).mean(dim=1))


def unrolled(m, x):
    """Call a cell for each position."""
    state, outputs = None, []
    for position in range(T):
        state = m.cell(x[:, position], state)
        outputs.append(state[0] if isinstance(state, tuple) else state)
    return torch.stack(outputs, dim=1)


def by_hand(m, x):
    """Write a recurrent cell with one state for all samples at the start."""
    state, outputs = m.start.expand(len(x), -1), []
    for position in range(T):
        state = torch.tanh(x[:, position] @ m.inward + state @ m.onward + m.bias)
        outputs.append(state)
    return torch.stack(outputs, dim=1)


def attention_with_temperature(m, x):
    return (m.temperature.exp() * (x @ x.mT)).softmax(dim=-1) @ x


def prompted(m, x):
    return m.norm(torch.cat([m.prompt.expand(len(x), -1, -1), x], dim=1))


class Recomputed(torch.autograd.Function):
    """Calls a module again in the backward pass, as the adjoint method does for equations."""

    @staticmethod
    def forward(ctx, module, x, *parameters):
        ctx.module = module
        ctx.save_for_backward(x, *parameters)
        return module(x)

    @staticmethod
    def backward(ctx, grad):
        x, *parameters = ctx.saved_tensors
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            return None, *torch.autograd.grad(ctx.module(x), [x, *parameters], grad)


MEETINGS = {
    "an expanded class token": (
        lambda m, x: torch.cat([m.token.expand(len(x), -1, -1), x], dim=1),
        {"token": (1, 1, D)},
    ),
    "a repeated class token": (
        lambda m, x: torch.cat([m.token.repeat(len(x), 1, 1), x], dim=1),
        {"token": (1, D)},
    ),
    "mask tokens, repeated for samples and positions": (
        lambda m, x: torch.cat([m.token.repeat(len(x), T - 1, 1), x], dim=1),
        {"token": (1, 1, D)},
    ),
    "a broadcast class token": (
        lambda m, x: torch.cat([x, torch.zeros_like(x[:, :1]) + m.token], dim=1),
        {"token": (D,)},
    ),
    "a class token put in place": (
        lambda m, x: torch.cat([m.token.expand_as(x[:, :1]), x[:, 1:]], dim=1),
        {"token": (D,)},
    ),
    "stacked class tokens": (
        lambda m, x: torch.cat([torch.stack([m.token] * len(x)), x], dim=1),
        {"token": (1, D)},
    ),
    "prompt tokens": (prompted, {"prompt": (3, D), "norm": lambda: nn.LayerNorm(D)}),
    "a mask token": (
        lambda m, x: torch.where(x[..., :1] > 0, x, m.token),
        {"token": (D,)},
    ),
    "a temperature": (attention_with_temperature, {"temperature": ()}),
    "a scale and a shift": (lambda m, x: m.scale * x + m.shift, {"scale": (), "shift": (1,)}),
    "layer scale": (lambda m, x: x + m.scale * x.tanh(), {"scale": (D,)}),
    "a quotient": (lambda m, x: x / m.scale.exp(), {"scale": (D,)}),
    "a divided parameter": (lambda m, x: m.scale / (2 + x.tanh()), {"scale": (D,)}),
    "a subtracted sample": (lambda m, x: m.shift - x, {"shift": (T, 1)}),
    "addcmul": (lambda m, x: torch.addcmul(x, x.tanh(), m.scale), {"scale": (D,)}),
    "lerp": (lambda m, x: torch.lerp(x, x.tanh(), m.scale), {"scale": (D,)}),
    "a power": (lambda m, x: x.abs().add(1).pow(m.exponent), {"exponent": (D,)}),
    "a maximum": (lambda m, x: torch.maximum(x, m.floor), {"floor": (D,)}),
    "einsum": (lambda m, x: torch.einsum("ntd,de->nte", x, m.weight), {"weight": (D, D)}),
    "einsum over positions": (
        lambda m, x: torch.einsum("ntd,ts->nsd", x, m.weight),
        {"weight": (T, 5)},
    ),
    "einsum per position": (
        lambda m, x: torch.einsum("ntd,tde->nte", x, m.weight),
        {"weight": (T, D, D)},
    ),
    "a weight per head": (
        lambda m, x: torch.einsum("ntd,hde->nthe", x, m.weight).flatten(2),
        {"weight": (2, D, 4), "width": 8},
    ),
    "a matrix on the left": (lambda m, x: m.weight @ x, {"weight": (5, T)}),
    "a vector": (lambda m, x: (x @ m.weight).unsqueeze(-1) * x, {"weight": (D,)}),
    "baddbmm": (
        lambda m, x: torch.baddbmm(m.bias, x, m.weight.expand(len(x), -1, -1)),
        {"bias": (1, 1, D), "weight": (D, D)},
    ),
    "bilinear": (
        lambda m, x: m.pair(x, x.tanh()),
        {"pair": lambda: nn.Bilinear(D, D, D)},
    ),
    "a cell, unrolled": (unrolled, {"cell": lambda: nn.RNNCell(D, D)}),
    "a gated cell, unrolled": (unrolled, {"cell": lambda: nn.GRUCell(D, D)}),
    "a memory cell, unrolled": (unrolled, {"cell": lambda: nn.LSTMCell(D, D)}),
    "a cell by hand": (
        by_hand,
        {"start": (D,), "inward": (D, D), "onward": (D, D), "bias": (D,)},
    ),
    "a kernel": (
        lambda m, x: functional.conv1d(x.mT, m.kernel, padding=1).mT,
        {"kernel": (D, D, 3)},
    ),
    "a norm of the positions": (
        lambda m, x: functional.layer_norm(x.mT, (T,), m.scale, m.shift).mT,
        {"scale": (T,), "shift": (T,)},
    ),
    "distances to centers": (
        lambda m, x: torch.cdist(x, m.centers.expand(len(x), -1, -1)),
        {"centers": (5, D), "width": 5},
    ),
    "distances to centers, by hand": (
        lambda m, x: (x[:, :, None] - m.centers).square().sum(dim=-1),
        {"centers": (5, D), "width": 5},
    ),
    "a codebook": (
        lambda m, x: m.codes[(x @ m.codes.mT).argmax(dim=-1)] + x,
        {"codes": (5, D)},
    ),
    "index_select": (
        lambda m, x: m.codes.index_select(0, (x[..., 0] > 0).long().flatten()).view_as(x) + x,
        {"codes": (2, D)},
    ),
    "an embedding of numbers": (
        lambda m, x: functional.embedding((x[..., 0] > 0).long(), m.codes) * x,
        {"codes": (2, D)},
    ),
    "a layer of the mean of the batch": (
        lambda m, x: x + m.center(x.mean(dim=0, keepdim=True).detach()),
        {"center": lambda: nn.Linear(D, D)},
    ),
    "a function that calls a module again": (
        lambda m, x: Recomputed.apply(m.inner, x, *m.inner.parameters()),
        {"inner": lambda: nn.Linear(D, D)},
    ),
    "a time that all samples share, mostly without effect": (
        lambda m, x: sum(w * (x + m.time(torch.full((1, 1), w).double())) for w in (0, 1, 0, 0)),
        {"time": lambda: nn.Linear(1, D)},
    ),
    "a state space": (
        lambda m, x: (x.cumsum(dim=1)[..., None] * m.decay.sigmoid()).sum(dim=-1),
        {"decay": (D, 3)},
    ),
}


@pytest.mark.parametrize("batch_size", [5, T, 1], ids=["ragged", "T", "one"])
@pytest.mark.parametrize("name", MEETINGS)
def test_rows_in_any_operation_are_gradients(name, batch_size):
    function, parts = MEETINGS[name]
    net = Sequences(function, **parts).double()
    assert_rows_are_gradients(net, data_of((T, D)), batch_size)


class Checkpointed(nn.Module):
    """Dropout, norms and layers in checkpoints, one within the other."""

    def __init__(self, use_reentrant, depth):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.head = nn.Linear(D, D), nn.Linear(D, 3)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(D, D), nn.Dropout(0.3), nn.LayerNorm(D), nn.ReLU(inplace=True))
            for _ in range(depth)
        )
        self.use_reentrant = use_reentrant

    def rest(self, x, number):
        if number == len(self.blocks):
            return x
        inner = self.blocks[number](x)
        if self.use_reentrant is None:
            return self.rest(inner, number + 1)
        return checkpoint(self.rest, inner, number + 1, use_reentrant=self.use_reentrant)

    def forward(self, x):
        if self.use_reentrant is None:
            return self.head(self.rest(self.first(x), 0))
        hidden = checkpoint(self.rest, self.first(x), 0, use_reentrant=self.use_reentrant)
        return self.head(hidden)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True")
@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("use_reentrant", [False, True], ids=["plain", "reentrant"])
def test_checkpointed_layers_are_recorded(use_reentrant, depth):
    def uncheckpointed(model):
        model.net.use_reentrant = None

    net = Checkpointed(use_reentrant, depth).double()
    assert_rows_are_gradients(net, data_of((D,)), reference=uncheckpointed)


def test_checkpoints_are_refused_where_torch_does_not_show_hooks(monkeypatch):
    monkeypatch.setattr("tda_lightning.gradients.nodes.saved_values._SHOWS_HOOKS", False)
    with pytest.raises(ValueError, match=r"checkpoints .*torch 2\.10 on"):
        assert_rows_are_gradients(Checkpointed(False, 2).double(), data_of((D,)))


def test_rows_under_autocast_are_gradients_up_to_rounding():
    net = Sequences(prompted, prompt=(3, D), norm=lambda: nn.LayerNorm(D))
    x, y = data_of((T, D)).tensors
    data = torch.utils.data.TensorDataset(x.float(), y)

    class Autocast(MeanOfLosses):
        def losses(self, batch):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                outputs = self.net(batch[0])
            return functional.cross_entropy(outputs.float(), batch[1], reduction="none")

    assert_rows_are_gradients(Autocast(net), data, tolerance=2e-2)


def test_an_output_that_depends_on_another_is_recorded():
    def entangled(m, x):
        first = m.inner(x)
        return first * m.outer(first.tanh() + x)

    parts = {"inner": lambda: nn.Linear(D, D), "outer": lambda: nn.Linear(D, D)}
    assert_rows_are_gradients(Sequences(entangled, **parts).double(), data_of((T, D)))


def test_a_gradient_penalty_on_inputs_is_recorded():
    class Penalized(MeanOfLosses):
        """Adds the squared gradient of each output with respect to its input."""

        def losses(self, batch):
            x = batch[0].clone().requires_grad_()
            outputs = self.net(x)
            losses = functional.cross_entropy(outputs, batch[1], reduction="none")
            (slope,) = torch.autograd.grad(outputs.square().sum(), x, create_graph=True)
            return losses + slope.square().sum(dim=1)

    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(D, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    assert_rows_are_gradients(Penalized(net), data_of((D,)))


class Hierarchical(MeanOfLosses):
    """A softmax in two levels; in some batches, a single sample reaches the second one."""

    def __init__(self):
        torch.manual_seed(0)
        super().__init__(nn.AdaptiveLogSoftmaxWithLoss(D, 5, [2]).double())

    def losses(self, batch):
        return -self.net(*batch).output


@pytest.mark.parametrize("batch_size", [5, 3, 1])
def test_rows_of_a_softmax_in_two_levels_are_gradients(batch_size):
    assert_rows_are_gradients(Hierarchical(), data_of((D,)), batch_size)


def test_rows_of_an_embedding_scaled_by_frequency_are_gradients():
    class OfFrequency(nn.Module):
        """Divides the gradients of tokens by their number in the batch."""

        def __init__(self):
            torch.manual_seed(0)
            super().__init__()
            self.embed = nn.Embedding(11, D, scale_grad_by_freq=True)
            self.head = nn.Linear(D, 3)

        def forward(self, x):
            tokens = x[..., 0].mul(10).long() % 11
            return self.head(self.embed(tokens).tanh().mean(dim=1))

    assert_rows_are_gradients(OfFrequency().double(), data_of((T, D)))
