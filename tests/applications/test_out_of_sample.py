"""Out-of-sample predictions: each sample's effects on its own logits are subtracted."""

import pytest
import torch
from lightning_models import Plain, loader, mlp, quiet_trainer, vectors
from torch.utils.data import Subset, TensorDataset

from tda_lightning import GradientRecorder, InfluenceFunction, Logit, LossRecorder, attribute
from tda_lightning.applications import out_of_sample_probabilities
from tda_lightning.stores import MemoryStore

CLASSES = 3


def logits_of(module, batch):
    return module.net(batch[0])


@pytest.fixture(scope="module")
def trained():
    torch.manual_seed(0)
    model, store = Plain(mlp()), MemoryStore()
    trainer = quiet_trainer(GradientRecorder(store), max_epochs=7)
    trainer.fit(model, loader(Subset(vectors(), range(1, 12))))
    return store, model


def own_effects(store, model, data):
    """Attribute each logit of each sample alone, one query after the other."""
    effects = torch.empty(len(data), CLASSES, dtype=torch.float64)
    for sample, label in ((i, c) for i in range(len(data)) for c in range(CLASSES)):
        query = [part[None] for part in data[sample]]
        scores = attribute(
            store,
            model,
            query,
            method=InfluenceFunction(),
            target=Logit(label, outputs=logits_of),
            at="now",
            progress=False,
        )
        at = (scores.train_ids == sample).nonzero()
        effects[sample, label] = float(scores.values[0, at]) if len(at) else 0.0
    return effects


@pytest.mark.parametrize("shuffle", [False, True])
def test_the_effects_of_each_sample_on_its_own_logits_are_subtracted(trained, shuffle):
    """Samples 0 and 12 were not trained on; what is predicted for them stays."""
    store, model = trained
    data = vectors()
    loaded = loader(data, shuffle=shuffle)
    found = out_of_sample_probabilities(store, model, loaded, outputs=logits_of, progress=False)
    with torch.no_grad():
        logits = model.net(data.tensors[0]).double()
    expected = (logits - own_effects(store, model, data)).softmax(dim=1)
    assert found.ids.tolist() == list(range(len(data)))
    torch.testing.assert_close(found.in_sample, logits.softmax(dim=1))
    torch.testing.assert_close(found.probabilities, expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found.probabilities[[0, 12]], found.in_sample[[0, 12]])
    assert found.labels.tolist() == data.tensors[1].tolist()
    assert found.to_pandas().shape == (len(data), CLASSES)
    assert "probabilities of 3 classes for 13 samples" in repr(found)


def test_a_sample_that_decided_its_own_prediction_is_less_sure_without_itself():
    torch.manual_seed(0)
    x, y = torch.randn(35, 7), torch.arange(35) % 2
    x[:, 0] += torch.where(y == 1, 3.0, -3.0)
    y[5] = 1 - y[5]
    model, store = Plain(mlp(7, 2)), MemoryStore()
    data = TensorDataset(x, y)
    quiet_trainer(GradientRecorder(store), max_epochs=15).fit(model, loader(data))
    settings = {"outputs": logits_of, "progress": False}
    found = out_of_sample_probabilities(store, model, loader(data), **settings)
    without, within = found.probabilities[5, y[5]], found.in_sample[5, y[5]]
    assert without < within


def test_losses_without_rows_are_refused():
    model, store = Plain(mlp()), MemoryStore()
    quiet_trainer(LossRecorder(store)).fit(model, loader(vectors()))
    with pytest.raises(ValueError, match="holds losses and no rows"):
        out_of_sample_probabilities(store, model, loader(vectors()), progress=False)
