"""Runs with ids from their batches: a loader's samples are matched by the same ids."""

import pytest
import torch
from lightning_models import Plain, loader, mlp, quiet_trainer, vectors
from torch.utils.data import TensorDataset

from tda_lightning import GradientRecorder
from tda_lightning.applications import (
    find_duplicates,
    find_mislabeled,
    out_of_sample_probabilities,
    unlearn,
)
from tda_lightning.stores import MemoryStore

N = 13
# Sample i of the dataset has the id IDS[i]: the same numbers in another order.
IDS = torch.arange(N).flip(0)


class WithIds(Plain):
    def training_step(self, batch, batch_idx):
        return super().training_step(batch[1:], batch_idx)


def ids_of(batch):
    return batch[0]


def settings():
    return {"outputs": lambda module, batch: module.net(batch[1]), "labels": lambda batch: batch[2]}


@pytest.fixture(scope="module")
def trained():
    data = TensorDataset(IDS, *vectors(n=N).tensors)
    store, model = MemoryStore(), WithIds(mlp())
    recorder = GradientRecorder(store, sample_ids=ids_of)
    quiet_trainer(recorder, max_epochs=3).fit(model, loader(data))
    return store, model, loader(data)


def test_labels_and_predictions_are_those_of_the_ids(trained):
    _, images, labels = trained[2].dataset.tensors
    found = find_mislabeled(*trained, sample_ids=ids_of, progress=False, **settings())
    assert found.labelled.given.tolist() == labels.flip(0).tolist()
    with torch.no_grad():
        predicted = trained[1].net(images).argmax(dim=1)
    assert found.labelled.predicted.tolist() == predicted.flip(0).tolist()


def test_copies_have_the_labels_of_their_ids(trained):
    labels = trained[2].dataset.tensors[2]
    found = find_duplicates(
        *trained, layer="net.0", labels=settings()["labels"], sample_ids=ids_of, progress=False
    )
    assert found.labels.tolist() == labels.flip(0).tolist()


@pytest.mark.parametrize(
    "answer",
    [
        lambda *trained: find_mislabeled(*trained, progress=False, **settings()),
        lambda *trained: find_duplicates(*trained, labels=None, layer="net.0", progress=False),
        lambda *trained: out_of_sample_probabilities(*trained, progress=False, **settings()),
        lambda store, model, data: unlearn(model, store, data, [3], progress=False),
    ],
    ids=["find_mislabeled", "find_duplicates", "out_of_sample_probabilities", "unlearn"],
)
def test_ids_of_another_origin_than_the_loaders_have_a_warning(trained, answer):
    with pytest.warns(UserWarning, match="ids of the run come from `sample_ids=`"):
        answer(*trained)
