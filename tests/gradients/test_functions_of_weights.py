"""A function of weights alone belongs to no sample, even if its shape looks like a batch.

Samples meet in batch norms, so that the gradient of one of them proves little.
"""

import pytest
import torch
from lightning_models import Plain, loader, quiet_trainer
from networks import data_of
from replayed import assert_rows_are_gradients
from torch import nn
from torch.nn.utils import parametrizations
from torch.nn.utils.parametrize import register_parametrization, remove_parametrizations
from zoo_rows import rows_by_parameter

from tda_lightning import GradientRecorder, Identity
from tda_lightning.gradients.capture.probe import Evidence
from tda_lightning.gradients.graph.sample_layout import SampleLayout
from tda_lightning.stores import MemoryStore

D = 6


class Divided(nn.Module):
    """Divides a weight by the norm of its product with a constant, as a spectral norm does."""

    def forward(self, weight):
        return weight / (weight @ torch.ones(D, dtype=weight.dtype)).norm()


KINDS = {
    "orthogonal": parametrizations.orthogonal,
    "divided": lambda layer: register_parametrization(layer, "weight", Divided()) or layer,
}


def network(parametrize, norm):
    torch.manual_seed(0)
    middle = parametrize(nn.Linear(D, D))
    return nn.Sequential(nn.Linear(5, D), norm, nn.Tanh(), middle, nn.Tanh(), nn.Linear(D, 3))


class InstanceNorm(nn.Module):
    def forward(self, x):
        return nn.functional.instance_norm(x[:, None])[:, 0]


@pytest.mark.parametrize("n", [3, D], ids=["a divisor", "as many as rows"])
@pytest.mark.parametrize("parametrize", KINDS.values(), ids=KINDS)
def test_behind_an_instance_norm_rows_are_gradients(parametrize, n):
    net = network(parametrize, InstanceNorm()).double()
    assert_rows_are_gradients(net, data_of((5,)), n)


def rows_of_first_step(net, n):
    """Record a step; return the rows by parameter."""
    store, model = MemoryStore(), Plain(net)
    recorder = GradientRecorder(store, projector=Identity(), preconditioner="none")
    quiet_trainer(recorder, max_steps=1).fit(model, loader(data_of((5,)), n, shuffle=False))
    return rows_by_parameter(model, store[0].sketch, store.recipe)


@pytest.mark.parametrize("n", [3, D], ids=["a divisor", "as many as rows"])
@pytest.mark.parametrize("parametrize", KINDS.values(), ids=KINDS)
def test_behind_a_batch_norm_rows_are_those_of_the_weight_carried_back(parametrize, n):
    net = network(parametrize, nn.BatchNorm1d(D)).double()
    plain = network(parametrize, nn.BatchNorm1d(D)).double()
    remove_parametrizations(plain[3], "weight")
    carried = [
        torch.autograd.grad(net[3].weight, net[3].parametrizations.weight.original, row.view(D, D))[
            0
        ]
        for row in rows_of_first_step(plain, n)["net.3.weight"]
    ]
    found = rows_of_first_step(net, n)["net.3.parametrizations.weight.original"]
    torch.testing.assert_close(found, torch.stack(carried).flatten(1))


def test_a_probed_sample_without_a_gradient_says_nothing_about_its_rows():
    rows, dead = torch.tensor([0.7, 0.1, 0.1, 0.1]), torch.zeros(4)
    evidence = Evidence(None, 0.4, probed=(2, 0), arrived=({0: dead}, {0: rows}))
    assert evidence.sets_apart(SampleLayout(0, 1, None), 4)
    evidence = Evidence(None, 0.4, probed=(2, 0), arrived=({0: rows}, {0: rows}))
    assert not evidence.sets_apart(SampleLayout(0, 1, None), 4)
