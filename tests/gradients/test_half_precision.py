"""Rows of half-precision activations: products in float32, and far less error than sketching."""

from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.nn import functional

from tda_lightning import Identity, KroneckerCountSketch
from tda_lightning.gradients.capture.row_owners import Trace
from tda_lightning.gradients.graph.sample_layout import IrregularRows, SampleLayout
from tda_lightning.gradients.parameter_selection import select_parameters
from tda_lightning.gradients.row_recorder import RowRecorder

N, T, D = 11, 13, 7
FORMATS = ["bf16-mixed", "16-mixed", "bf16-true"]


class Tokens(nn.Module):
    """Classifies sequences; its layers see tokens, patches and vectors."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.middle = nn.Linear(D, 32), nn.Conv1d(32, 32, 3, padding=1)
        self.head = nn.Linear(32, 5)

    def forward(self, x):
        x = self.body(x).tanh()
        return self.head(self.middle(x.mT).relu().mean(dim=2))


def inputs():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(N, T, D, generator=generator), torch.arange(N) % 5


def network_in(precision):
    """Return a network in a precision, its inputs, and the context of its forward pass."""
    (x, y), net = inputs(), Tokens()
    if precision == "bf16-true":
        return net.to(torch.bfloat16), x.to(torch.bfloat16), y, nullcontext()
    dtype = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}[precision]
    return net, x, y, torch.autocast("cpu", dtype)


def record(net, x, y, context, projector):
    """Return the rows of the sum of losses, and each layer's inputs and output gradients."""
    factors = {}

    def hook(module, args, output):
        output.register_hook(lambda grad: factors.update({module: (args[0].detach(), grad)}))

    for layer in net.children():
        layer.register_forward_hook(hook)
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    with RowRecorder(net, select_parameters(net), {}, projector, dtype) as recorder:
        recorder.start(N)
        with context:
            loss = functional.cross_entropy(net(x).float(), y, reduction="sum")
        recorder.start_backward(loss)
        loss.backward()
        return recorder.end_backward().rows, factors


def exact_products(net, factors):
    """Return each parameter's products of inputs and output gradients, in float64."""
    rows = []
    for layer in net.children():
        x, grad = factors[layer]
        x, grad = x.to(grad.dtype).double(), grad.double()  # Autocast rounds inputs.
        if isinstance(layer, nn.Conv1d):
            patches = functional.pad(x, (1, 1)).unfold(2, 3, 1)  # (n, channels, t, 3)
            weight = torch.einsum("not,nctk->nock", grad, patches).flatten(2)
            bias = grad.sum(dim=2)
        else:
            x, grad = x.reshape(N, -1, x.shape[-1]), grad.reshape(N, -1, grad.shape[-1])
            weight, bias = grad.mT @ x, grad.sum(dim=1)
        rows += [weight.flatten(1), bias]
    return rows


@pytest.mark.parametrize("precision", FORMATS)
def test_rows_are_products_in_single_precision_and_sums_are_rounded_once(precision):
    net, x, y, context = network_in(precision)
    rows, factors = record(net, x, y, context, Identity())
    dtype = factors[net.head][1].dtype
    assert dtype in (torch.bfloat16, torch.float16)
    sizes = [parameter.numel() for parameter in net.parameters()]
    pairs = zip(rows.split(sizes, dim=1), exact_products(net, factors), strict=True)
    for parameter, (recorded, expected) in zip(net.parameters(), pairs, strict=True):
        error = (recorded.double() - expected).norm() / expected.norm()
        assert error < (1e-6 if parameter.ndim > 1 else torch.finfo(dtype).eps / 2)


@pytest.mark.parametrize("precision", FORMATS)
def test_the_precision_of_the_activations_adds_far_less_error_than_the_sketch(precision):
    """Against the gradients of the same weights in double precision."""
    net, x, y, context = network_in(precision)
    rows, _ = record(net, x, y, context, Identity())
    wide, _ = record(net.double(), x.double(), y, nullcontext(), Identity())
    sketched, _ = record(net, x.double(), y, nullcontext(), KroneckerCountSketch(2048))

    def error(candidate):
        difference = candidate.double() @ candidate.double().mT - wide @ wide.mT
        return (difference / (wide.norm(dim=1)[:, None] * wide.norm(dim=1))).norm() / N

    assert error(rows) < error(sketched) / 5


def test_few_blurred_rows_do_not_overrule_the_order_of_samples_in_half_precision():
    traced = torch.tensor([0, 0, 1, 1, 2, 0])  # The last row is the third sample's.
    squares = torch.tensor([1.0, 2.0, 3.0, 1.0, 2.0, 0.1])
    rows, certain = IrregularRows(traced, 3), torch.ones(6, dtype=torch.bool)
    owners = SampleLayout(0, 1, None).owners(6, 3)
    assert Trace(rows, torch.tensor(1.0), certain, squares, blurred=0.02).agrees(owners)
    assert not Trace(rows, torch.tensor(1.0), certain, squares, blurred=0.0).agrees(owners)
    assert not Trace(rows, torch.tensor(1.0), certain, squares + 1, blurred=0.02).agrees(owners)
