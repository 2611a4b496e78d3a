"""A binary cross-entropy has one logit per sample; uses see the logits of both classes."""

import pytest
import torch
from lightning_models import Plain, loader, mlp, quiet_trainer, vectors
from torch.nn import functional
from torch.utils.data import TensorDataset

from tda_lightning import GradientRecorder, InfluenceFunction, LogProbability, Margin, attribute
from tda_lightning.applications import (
    explain_errors,
    find_mislabeled,
    find_shortcut,
    out_of_sample_probabilities,
)
from tda_lightning.stores import MemoryStore

N = 23


class Binary(Plain):
    """One logit per sample, of shape ``(n,)`` or ``(n, 1)``."""

    def __init__(self, shape, loss=functional.binary_cross_entropy_with_logits):
        super().__init__(mlp(classes=1), loss)
        self.shape = shape

    def forward(self, x):
        return self.net(x).reshape(-1, *self.shape)

    def training_step(self, batch, batch_idx):
        return self.loss(self(batch[0]), batch[1])


def trained(shape, loss=functional.binary_cross_entropy_with_logits):
    torch.manual_seed(0)
    x, y = torch.randn(N, 7), torch.arange(N) % 2
    x[:, 0] += 1.0 - 2.0 * y
    data = TensorDataset(x, y.float().reshape(-1, *shape))
    model, store = Binary(shape, loss), MemoryStore()
    quiet_trainer(GradientRecorder(store), max_epochs=5).fit(model, loader(data))
    return store, model, data


@pytest.mark.parametrize("shape", [(), (1,)], ids=["(n,)", "(n, 1)"])
def test_labels_and_predictions_are_those_of_two_classes(shape):
    store, model, data = trained(shape)
    x, y = data.tensors[0], data.tensors[1].flatten().long()
    with torch.no_grad():
        predicted = (model(x).flatten() > 0).long()
    assert 0 < int((predicted != y).sum()) < N
    found = find_mislabeled(store, model, loader(data), progress=False)
    assert found.labelled.given.tolist() == y.tolist()
    assert found.labelled.predicted.tolist() == predicted.tolist()
    errors = explain_errors(store, model, loader(data), progress=False)
    assert sorted(errors.ids.tolist()) == (predicted != y).nonzero()[:, 0].tolist()


def test_the_effect_of_each_sample_on_its_own_logit_is_subtracted():
    store, model, data = trained(())
    found = out_of_sample_probabilities(store, model, loader(data), progress=False)
    scores = attribute(
        store,
        model,
        list(data.tensors),
        method=InfluenceFunction(),
        at="now",
        target=lambda module, batch: module(batch[0]),
        progress=False,
    )
    with torch.no_grad():
        logits = model(data.tensors[0]).double()
    expected = (logits - scores.values.diagonal()).sigmoid()
    torch.testing.assert_close(found.probabilities[:, 1], expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found.in_sample[:, 1], logits.sigmoid())


@pytest.mark.parametrize("shape", [(), (1,)], ids=["(n,)", "(n, 1)"])
def test_predictions_of_class_0_are_driven_by_samples_of_class_0(shape):
    store, model, data = trained(shape)
    x, y = data.tensors[0], data.tensors[1].flatten()
    with torch.no_grad():
        is_zero = model(x).flatten() < 0
    slice_ = [x[is_zero], data.tensors[1][is_zero]]
    found = find_shortcut(store, model, slice_, {"zero": y == 0}, progress=False)
    assert found.effects[0].effect > 2


def test_probabilities_are_no_logits():
    def loss(outputs, labels):
        return functional.binary_cross_entropy(outputs, labels)

    class Sigmoid(Binary):
        def forward(self, x):
            return super().forward(x).sigmoid()

    store, model, data = trained(())
    wrong = Sigmoid((), loss)
    wrong.load_state_dict(model.state_dict())
    with pytest.raises(ValueError, match="behind a sigmoid; expected logits"):
        explain_errors(store, wrong, loader(data), progress=False)

    class Softmax(Plain):
        def forward(self, x):
            return self.net(x).softmax(dim=1)

    softmax, batch = Softmax(mlp()), vectors().tensors
    with pytest.raises(ValueError, match="behind a softmax; expected logits"):
        explain_errors(store, softmax, loader(vectors()), progress=False)
    for target in (LogProbability(), Margin()):
        with pytest.raises(ValueError, match="behind a softmax; expected logits"):
            target(softmax, batch)
        of_logs = type(target)(outputs=lambda module, batch: module(batch[0]).log())
        of_logits = type(target)(outputs=lambda module, batch: module.net(batch[0]))
        torch.testing.assert_close(of_logs(softmax, batch), of_logits(softmax, batch))
