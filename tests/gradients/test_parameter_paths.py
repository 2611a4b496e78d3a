"""Rows of parameters that act through functions of parameters: stacks, chunks, norms, products."""

import pytest
import torch
from networks import data_of
from replayed import MeanOfLosses, assert_rows_are_gradients
from torch import nn
from torch.nn import functional
from torch.nn.utils import parametrizations, parametrize

D = 7


class Net(nn.Module):
    """A function of some parameters and of a batch, with a head.

    Args:
        function: From the module and its inputs ``(n, 7)`` to hidden values ``(n, 5)``.
        shapes: Shapes of the parameters by name.
    """

    def __init__(self, function, **shapes):
        super().__init__()
        torch.manual_seed(0)
        self.function = function
        for name, shape in shapes.items():
            setattr(self, name, nn.Parameter(torch.randn(shape) / 3))
        self.head = nn.Linear(5, 3)

    def forward(self, x):
        return self.head(self.function(self, x).tanh())


class Normalized(nn.Module):
    """Standardizes the weight of a layer."""

    def forward(self, weight):
        return (weight - weight.mean(dim=1, keepdim=True)) / weight.std(dim=1, keepdim=True)


class Half(torch.autograd.Function):
    """A linear map with half the gradient, of which no rule is known."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return x @ weight

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        return grad @ weight.mT, x.mT @ grad / 2


class Affine(torch.autograd.Function):
    """Scale and shift, among arguments that are no tensors or need no gradient."""

    @staticmethod
    def forward(ctx, factor, x, constant, scale, shift):
        ctx.factor = factor
        ctx.save_for_backward(x, constant, scale)
        return factor * x * constant * scale + shift

    @staticmethod
    def backward(ctx, grad):
        x, constant, scale = ctx.saved_tensors
        slope = ctx.factor * constant * grad
        return None, slope * scale, None, (slope * x).sum(dim=0), grad.sum(dim=0)


def experts(m, x):
    gates = (x[:, :3] @ m.gate).softmax(dim=-1)
    return sum(gates[:, e, None] * (x @ m.stack[e]) for e in range(3))


def fused_experts(m, x):
    gates = (x[:, :3] @ m.gate).softmax(dim=-1)
    hidden = torch.bmm(x.expand(3, -1, -1), m.stack)  # (3, n, 5)
    return torch.einsum("ne,ned->nd", gates, hidden.transpose(0, 1))


def chunks(m, x):
    query, key, value = (functional.linear(x, part) for part in m.joint.chunk(3))
    return query * key.softmax(dim=-1) + value + m.bias.split(5)[1]


def reused(m, x):
    hidden = (x @ m.weight).tanh()
    return functional.linear(hidden, m.weight).tanh() @ m.weight + hidden


def batch_normed(weight, scale=None):
    """Standardize each row of a weight, as its channels would be."""
    return functional.batch_norm(weight[None], None, None, weight=scale, training=True)[0]


def reflected(m, x):
    """Reflect the inputs, by a product that starts with a constant matrix."""
    identity = torch.eye(15, dtype=x.dtype)  # As many rows as 5 samples of 3, or 3 of 5.
    matrix = identity
    for vector in m.vectors:
        matrix = matrix @ (identity - 2 * torch.outer(vector, vector))
    return x.repeat(1, 3)[:, :15] @ matrix


PATHS = {
    "bare": (lambda m, x: x @ m.weight + m.bias, {"weight": (D, 5), "bias": (5,)}),
    "transposed": (lambda m, x: x @ m.weight.mT, {"weight": (5, D)}),
    "used twice, once transposed": (reused, {"weight": (D, 5)}),
    "experts in a stack": (experts, {"stack": (3, D, 5), "gate": (3, 3)}),
    "unbound experts": (
        lambda m, x: sum((x @ w).tanh() for w in m.stack.unbind(0)),
        {"stack": (3, D, 5)},
    ),
    "the last expert": (lambda m, x: x @ m.stack[-1], {"stack": (3, D, 5)}),
    "experts in one product": (fused_experts, {"stack": (3, D, 5), "gate": (3, 3)}),
    "experts on the second axis": (lambda m, x: x @ m.stack[:, 1], {"stack": (D, 3, 5)}),
    "chunks of one matrix": (chunks, {"joint": (15, D), "bias": (15,)}),
    "a slice": (lambda m, x: x[:, 2:6] @ m.weight[2:6], {"weight": (D, 5)}),
    "a slice from the end": (lambda m, x: x[:, :3] @ m.weight[-3:], {"weight": (D, 5)}),
    "every second row": (lambda m, x: x[:, :4] @ m.weight[::2], {"weight": (D, 5)}),
    "columns": (lambda m, x: x @ m.weight[:, 1:6], {"weight": (D, 8)}),
    "chosen rows": (lambda m, x: x[:, :3] @ m.weight[[4, 0, 4]], {"weight": (D, 5)}),
    "chosen again by a mask": (
        lambda m, x: x @ (m.weight * (torch.arange(5) != 2)),
        {"weight": (D, 5)},
    ),
    "reshaped": (lambda m, x: x @ m.weight.reshape(D, 5), {"weight": (35,)}),
    "reshaped otherwise": (lambda m, x: x @ m.weight.reshape(D, 5), {"weight": (5, D)}),
    "cast": (lambda m, x: (x.float() @ m.weight.float()).double(), {"weight": (D, 5)}),
    "standardized": (lambda m, x: x @ Normalized()(m.weight), {"weight": (D, 5)}),
    "standardized by a batch norm": (
        lambda m, x: functional.linear(x, batch_normed(m.weight)),
        {"weight": (5, D)},
    ),
    "standardized by a batch norm, and scaled": (
        lambda m, x: functional.linear(x, batch_normed(m.weight, m.scale)),
        {"weight": (5, D), "scale": (5,)},
    ),
    "standardized by a layer norm": (
        lambda m, x: functional.linear(x, functional.layer_norm(m.weight, (D,))),
        {"weight": (5, D)},
    ),
    "exponentiated": (lambda m, x: x @ m.weight.exp(), {"weight": (D, 5)}),
    "merged low-rank": (
        lambda m, x: functional.linear(x, m.weight + 0.5 * (m.up @ m.down)),
        {"weight": (5, D), "up": (5, 2), "down": (2, D)},
    ),
    "separate low-rank": (
        lambda m, x: x @ m.weight + x @ m.down @ m.up,
        {"weight": (D, 5), "down": (D, 2), "up": (2, 5)},
    ),
    "scaled by another": (
        lambda m, x: x @ (m.weight * m.scale),
        {"weight": (D, 5), "scale": (5,)},
    ),
    "reflections": (reflected, {"vectors": (2, 15)}),
    "concatenated": (
        lambda m, x: x @ torch.cat([m.first, m.second]),
        {"first": (3, 5), "second": (4, 5)},
    ),
    "stacked": (
        lambda m, x: x @ torch.stack([m.first, m.second], dim=1),
        {"first": (D,), "second": (D,), "head_bias": (2,)},
    ),
    "made by another network": (
        lambda m, x: x @ (m.codes @ m.decoder).tanh(),
        {"codes": (D, 2), "decoder": (2, 5)},
    ),
    "a custom function": (lambda m, x: Half.apply(x, m.weight), {"weight": (D, 5)}),
    "a custom function with a constant and a number": (
        lambda m, x: Affine.apply(2, x[:, :5].square(), torch.arange(5), m.scale, m.shift),
        {"scale": (5,), "shift": (5,)},
    ),
    "a custom function of a cast": (
        lambda m, x: Half.apply(x, m.weight.exp().mT),
        {"weight": (5, D)},
    ),
}


@pytest.mark.parametrize("batch_size", [5, 3], ids=["five", "as classes"])
@pytest.mark.parametrize("name", PATHS)
def test_rows_through_functions_of_parameters_are_gradients(name, batch_size):
    function, shapes = PATHS[name]
    net = Net(function, **shapes).double()
    if name == "reflections":
        net.head = nn.Linear(15, 3).requires_grad_(False).double()
    if name == "stacked":
        net.head, net.head_bias = nn.Linear(2, 3).double(), None
    tolerance = 1e-5 if name == "cast" else 1e-10
    assert_rows_are_gradients(net, data_of((D,)), batch_size, tolerance=tolerance)


def layer(wrap):
    torch.manual_seed(0)
    return nn.Sequential(wrap(nn.Linear(D, 5)), nn.Tanh(), nn.Linear(5, 3)).double()


def standardized(module):
    parametrize.register_parametrization(module, "weight", Normalized())
    return module


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated")
@pytest.mark.parametrize(
    "wrap",
    [parametrizations.weight_norm, parametrizations.orthogonal, nn.utils.weight_norm, standardized],
    ids=["weight norm", "orthogonal", "weight norm by hooks", "own parametrization"],
)
def test_parametrized_layers_are_recorded(wrap):
    store = assert_rows_are_gradients(layer(wrap), data_of((D,)))
    names = [block.name for block in store.recipe.blocks]
    assert len(names) == len(list(layer(wrap).parameters()))


def test_parameters_of_the_lightning_module_itself_are_recorded():
    class Functional(MeanOfLosses):
        def __init__(self):
            super().__init__(nn.Linear(5, 3))
            torch.manual_seed(0)
            self.weight, self.scale = nn.Parameter(torch.randn(5, D)), nn.Parameter(torch.ones(D))
            self.unused = nn.Parameter(torch.ones(2))

        def losses(self, batch):
            x, y = batch
            hidden = functional.linear(x * self.scale, self.weight).tanh()
            outputs = functional.linear(hidden, self.net.weight, self.net.bias)
            return functional.cross_entropy(outputs, y, reduction="none")

    store = assert_rows_are_gradients(Functional().double(), data_of((D,)))
    assert [(b.name, b.layer, b.modules, b.rows, b.columns) for b in store.recipe.blocks] == [
        ("weight", "Functional", ("",), 5, 7),
        ("scale", "Functional", ("",), 7, 1),
        ("unused", "Functional", ("",), 2, 1),
        ("net.weight", "Linear", ("net",), 3, 5),
        ("net.bias", "Linear", ("net",), 3, 1),
    ]
    assert not any(step.sketch[:, 42:44].any() for step in store)


def test_a_tied_weight_has_one_block_with_all_its_uses():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.encode = nn.Linear(D, 5)
            self.again = nn.Linear(D, 5)
            self.again.weight = self.encode.weight
            self.head = nn.Linear(5, 3)

        def forward(self, x):
            hidden = functional.linear(self.encode(x).tanh(), self.encode.weight.mT).tanh()
            return self.head(self.again(hidden + self.encode(hidden) @ self.encode.weight))

    store = assert_rows_are_gradients(Tied().double(), data_of((D,)))
    blocks = {block.name: block for block in store.recipe.blocks}
    assert "net.again.weight" not in blocks
    assert blocks["net.encode.weight"].modules == ("net.encode", "net.again")


@pytest.mark.parametrize(
    ("shape", "matrix"),
    [((3, 4, 5), (12, 5)), ((5, 3, 4), (5, 12)), ((2, 2, 2, 2), (4, 4)), ((7, 2), (7, 2))],
    ids=str,
)
def test_parameters_of_several_axes_are_matrices_as_square_as_their_axes_allow(shape, matrix):
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.values = nn.Parameter(torch.rand(*shape))
            self.head = nn.Linear(D, 3)

        def forward(self, x):
            return self.head(x) * (self.values * x[:, :1].reshape(-1, *[1] * len(shape))).sum(
                dim=tuple(range(1, 1 + len(shape)))
            ).unsqueeze(1)

    store = assert_rows_are_gradients(Scaled().double(), data_of((D,)))
    block = store.recipe.blocks[0]
    assert (block.rows, block.columns) == matrix
