"""Parameters that meet data in several nodes of a graph: recurrent cells and shared layers."""

import pytest
import torch
from lightning_models import loader, quiet_trainer
from replayed import MeanOfLosses, assert_rows_are_gradients
from torch import nn
from torch.nn import functional
from torch.utils.data import TensorDataset

from tda_lightning import GradientRecorder
from tda_lightning.gradients import row_sum
from tda_lightning.gradients.capture.parameter_paths import ParameterGradient
from tda_lightning.gradients.factors import Dense, GradientFactors
from tda_lightning.gradients.row_sum import RepeatedGradients
from tda_lightning.stores import MemoryStore

N, T, D, H, CLASSES = 13, 11, 7, 5, 3


class Sequences(MeanOfLosses):
    """A classifier of sequences.

    Args:
        modules: Its modules.
        state: From the modules and a batch of sequences to a state per sequence.
    """

    def __init__(self, modules, state):
        super().__init__(nn.Identity())
        torch.manual_seed(0)
        self.parts, self.head = nn.ModuleDict(modules()), nn.Linear(H, CLASSES)
        self.state = state
        self.double()

    def losses(self, batch):
        inputs, labels = batch
        state = self.state(self.parts, inputs)
        return functional.cross_entropy(self.head(state), labels, reduction="none")


def unrolled_cell(parts, x):
    state = x.new_zeros(len(x), H)
    for step in x.unbind(dim=1):
        state = parts["cell"](step, state)
    return state


def unrolled_memory(parts, x):
    state = (x.new_zeros(len(x), H), x.new_zeros(len(x), H))
    for step in x.unbind(dim=1):
        state = parts["cell"](step, state)
    return state[0]


def shared_by_views(parts, x):
    """Use one layer for single steps, for pairs of steps, and in the head."""
    steps, pairs = parts["embed"](x), parts["embed"](x.unfold(1, 2, 1).mean(dim=-1))
    return parts["embed"](x[:, 0]) + steps.mean(dim=1) + parts["norm"](pairs).sum(dim=1)


def deep_equilibrium(parts, x):
    state = parts["embed"](x.mean(dim=1))
    for _ in range(4):
        state = torch.tanh(parts["again"](state) + parts["scale"](state))
    return state


CASES = {
    "GRU": (lambda: {"layer": nn.GRU(D, H, batch_first=True)}, lambda p, x: p["layer"](x)[1][-1]),
    "RNN": (lambda: {"layer": nn.RNN(D, H, batch_first=True)}, lambda p, x: p["layer"](x)[1][-1]),
    "GRU cell": (lambda: {"cell": nn.GRUCell(D, H)}, unrolled_cell),
    "LSTM cell": (lambda: {"cell": nn.LSTMCell(D, H)}, unrolled_memory),
    "layer of several views": (
        lambda: {"embed": nn.Linear(D, H), "norm": nn.LayerNorm(H)},
        shared_by_views,
    ),
    "layer used again": (
        lambda: {
            "embed": nn.Linear(D, H),
            "again": nn.Linear(H, H, bias=False),
            "scale": nn.LayerNorm(H),
        },
        deep_equilibrium,
    ),
}
DATA = TensorDataset(
    torch.randn(N, T, D, generator=torch.Generator().manual_seed(1)).double(),
    torch.arange(N) % CLASSES,
)


@pytest.mark.parametrize("room", [2**22, 300], ids=["all wait", "few wait"])
@pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))
def test_rows_of_shared_parameters_are_gradients(monkeypatch, case, room):
    monkeypatch.setattr(row_sum, "_MAX_WAITING", room)
    assert_rows_are_gradients(Sequences(*case), DATA)


def rows_under_adam(curvature):
    store, model = MemoryStore(), Sequences(*CASES["GRU"])
    model.optimizer = lambda parameters: torch.optim.AdamW(parameters, lr=0.01)
    recorder = GradientRecorder(store, curvature=curvature)
    quiet_trainer(recorder, max_epochs=3).fit(model, loader(DATA, shuffle=False))
    rows = [step.sketch for step in store]
    rows += [step.curvature_rows for step in store if step.curvature_rows is not None]
    return torch.cat(rows)


@pytest.mark.parametrize("curvature", ["none", "fisher"])
def test_joined_gradients_have_the_same_rows_in_the_coordinates_of_adam(monkeypatch, curvature):
    joined = rows_under_adam(curvature)
    monkeypatch.setattr(row_sum, "_kind", lambda gradient: None)
    torch.testing.assert_close(joined, rows_under_adam(curvature))


def test_gradients_of_a_parameter_are_received_once_from_the_second_pass_on():
    weight, bias = nn.Parameter(torch.zeros(3, 2)), nn.Parameter(torch.zeros(3))
    received, counts = [], {}
    repeated = RepeatedGradients(received.append, counts)
    expected = torch.zeros(N, 3, 2)
    for n_steps in (0, 5, 5):
        received.clear()
        expected.zero_()
        for s in range(1, n_steps + 1):
            inputs, grads = torch.randn(N * s, 2), torch.randn(N * s, 3)
            factors = GradientFactors(inputs=Dense(inputs, N), grad_outputs=Dense(grads, N))
            repeated.receive(ParameterGradient(weight, factors, (3, 2)))
            expected += torch.einsum("nsi,nso->noi", inputs.view(N, s, 2), grads.view(N, s, 3))
        repeated.receive(ParameterGradient(bias, torch.randn(N, 3), (3,)))
        repeated.finish()
    assert [gradient.parameter for gradient in received] == [bias, weight]
    torch.testing.assert_close(received[1].contribution.products(), expected)
    assert counts == {weight: 5, bias: 1}
