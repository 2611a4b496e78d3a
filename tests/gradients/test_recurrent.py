"""Rows of recurrent layers, whose fused kernels exist in single precision only."""

import copy

import pytest
import pytorch_lightning as pl
import torch
from lightning_models import loader, quiet_trainer
from torch import nn
from torch.nn import functional
from torch.utils.data import TensorDataset

from tda_lightning import GradientRecorder, Identity
from tda_lightning.gradients.nodes import rule
from tda_lightning.stores import MemoryStore

N, T, D, H, CLASSES = 7, 11, 5, 3, 2


def last_output(outputs, state):
    return outputs[:, -1]


def all_outputs(outputs, state):
    return outputs.tanh().sum(dim=1)


def hidden_state(outputs, state):
    return state[0][-1]


def cell_state(outputs, state):
    return state[1][-1] + state[0][0]


class Recurrent(pl.LightningModule):
    def __init__(self, read=last_output, is_first=True, start=None, **settings):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.LSTM(D, H, batch_first=is_first, **settings)
        width = H * (2 if settings.get("bidirectional") and "output" in read.__name__ else 1)
        self.head = nn.Linear(width, CLASSES)
        self.read, self.is_first = read, is_first
        self.start = None
        if start == "learned":
            self.start = nn.ParameterList([torch.randn(1, 1, H) for _ in range(2)])
        elif start == "data":
            self.encoder = nn.Linear(D, H)
        self.starts_with = start

    def losses(self, inputs, labels):
        state = None
        if self.starts_with == "data":
            state = tuple(self.encoder(inputs[:, 0])[None] for _ in range(2))
        elif self.starts_with == "learned":
            state = tuple(each.expand(1, len(inputs), H).contiguous() for each in self.start)
        outputs, last = self.layer(inputs if self.is_first else inputs.transpose(0, 1), state)
        outputs = outputs if self.is_first else outputs.transpose(0, 1)
        logits = self.head(self.read(outputs, last))
        return functional.cross_entropy(logits, labels, reduction="none")

    def training_step(self, batch, batch_idx):
        return self.losses(*batch).mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


CASES = {
    "last output": {},
    "all outputs": {"read": all_outputs},
    "hidden state only": {"read": hidden_state},
    "hidden and cell state": {"read": cell_state},
    "time first": {"is_first": False},
    "no biases": {"bias": False},
    "two layers": {"num_layers": 2, "read": all_outputs},
    "both directions": {"bidirectional": True, "read": all_outputs},
    "two layers in both directions": {"bidirectional": True, "num_layers": 2, "read": all_outputs},
    "a state from the data": {"start": "data", "read": all_outputs},
    "a learned state": {"start": "learned", "read": all_outputs},
}


@pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))
def test_rows_of_a_fused_layer_are_gradients(case):
    model = Recurrent(**case)
    inputs, labels = torch.randn(N, T, D), torch.randint(CLASSES, (N,))
    exact = copy.deepcopy(model).double()  # Computed step by step, not by the fused kernel.
    store = MemoryStore()
    recorder = GradientRecorder(store, projector=Identity())
    trainer = quiet_trainer(recorder, max_epochs=1)
    trainer.fit(model, loader(TensorDataset(inputs, labels), N, shuffle=False))
    assert sum(block.size for block in store.recipe.blocks) == sum(
        p.numel() for p in exact.parameters()
    )
    names = [name for block in store.recipe.blocks for name in block.parameters]
    parameters = dict(exact.named_parameters())
    for row, sample, label in zip(store[0].sketch, inputs.double(), labels, strict=True):
        loss = exact.losses(sample[None], label[None]).sum() / N
        grads = torch.autograd.grad(loss, [parameters[name] for name in names])
        expected = torch.cat([grad.flatten() for grad in grads])
        torch.testing.assert_close(row.double(), expected, rtol=1e-4, atol=1e-7)


def test_a_fused_layer_is_not_called_once_per_sample(monkeypatch):
    def refuse(call):
        raise AssertionError(type(call.node).__name__)

    monkeypatch.setattr(rule, "per_sample_vjp", refuse)
    monkeypatch.setattr("tda_lightning.gradients.nodes.recurrent.per_sample_vjp", refuse)
    data = TensorDataset(torch.randn(N, T, D), torch.randint(CLASSES, (N,)))
    quiet_trainer(GradientRecorder(MemoryStore()), max_epochs=1).fit(Recurrent(), loader(data, N))
