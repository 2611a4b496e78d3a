"""Ids of queries: those of the data, by one convention with training samples."""

import pytest
import pytorch_lightning as pl
import torch
from lightning_models import IndexedVectors, Plain, loader, mlp, quiet_trainer, vectors
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, IterableDataset, Subset

from tda_lightning import (
    GradientRecorder,
    TracIn,
    attribute,
    attribute_by_features,
    attribute_by_gradients,
    top_attributions,
    trajectory,
)
from tda_lightning.full_influence import FullInfluenceFunction, Woodbury
from tda_lightning.stores import MemoryStore

DATA, IDS = IndexedVectors(), [11, 2, 5, 7, 3]


@pytest.fixture(scope="module")
def run():
    store, model = MemoryStore(), Plain(mlp())
    quiet_trainer(GradientRecorder(store, snapshots=2)).fit(model, loader(DATA))
    return store, model


def by_sample(run, **settings):
    store, model = run
    batch = torch.utils.data.default_collate([DATA[i] for i in sorted(IDS)])
    return attribute(store, model, batch, progress=False, **settings)


@pytest.mark.parametrize("settings", [{}, {"at": "snapshots"}], ids=str)
def test_a_shuffled_loader_of_a_subset_has_the_ids_of_the_data(run, settings):
    store, model = run
    queries = loader(Subset(DATA, IDS), batch_size=2)
    scores = attribute(store, model, queries, method=TracIn(), progress=False, **settings)
    assert sorted(scores.query_ids.tolist()) == sorted(IDS)
    order = scores.query_ids.argsort()
    expected = by_sample(run, method=TracIn(), **settings)
    torch.testing.assert_close(scores.values[order], expected.values)
    assert expected.query_ids.tolist() == [0, 1, 2, 3, 4]  # A batch has positions.


def test_all_answers_have_these_ids(run):
    store, model = run
    queries = loader(Subset(DATA, IDS), batch_size=2, shuffle=False)
    top = top_attributions(store, model, queries, k=2, progress=False)
    assert top.query_ids.tolist() == top.proponents.query_ids.tolist() == IDS
    assert trajectory(store, model, queries, [3], progress=False).query_ids.tolist() == IDS
    assert attribute([store, store], [model, model], queries).query_ids.tolist() == IDS
    alike = attribute_by_features(model, loader(DATA), queries, progress=False)
    assert alike.query_ids.tolist() == IDS
    method = FullInfluenceFunction(solver=Woodbury(), damping=0.1)
    full = attribute_by_gradients(model, loader(DATA), queries, method=method, progress=False)
    assert full.query_ids.tolist() == IDS


class Stream(IterableDataset):
    def __iter__(self):
        return iter([DATA[i] for i in sorted(IDS)])


def test_where_ids_are_unknown_they_are_positions(run):
    store, model = run
    scores = attribute(store, model, DataLoader(Stream(), batch_size=2), progress=False)
    assert scores.query_ids.tolist() == [0, 1, 2, 3, 4]
    torch.testing.assert_close(scores.values, by_sample(run).values)


def test_a_gradient_of_zero_is_named():
    class Hinge(Plain):
        def training_step(self, batch, batch_idx):
            return (1 - self.net(batch[0]).sum(dim=1) * batch[1]).clamp_min(0).mean()

    store, model = MemoryStore(), Hinge(torch.nn.Linear(7, 1))
    # No snapshots: the labels below make losses flat at the weights after the training only.
    quiet_trainer(GradientRecorder(store, snapshots=0)).fit(model, loader(vectors()))
    x = vectors()[:3][0]
    sign = model.net(x).detach().sum(dim=1)
    labels = torch.stack([1e3 / sign[0], -1e3 / sign[1], 1e3 / sign[2]])
    message = "2 of 3 queries have a gradient of zero, the first of them query 0"
    with pytest.warns(UserWarning, match=message):
        scores = attribute(store, model, (x, labels), progress=False)
    assert "query 0: all scores are zero" in repr(scores)
    assert "query 1: proponents" in repr(scores)


class WarmUp(Plain):
    """A model whose step needs its trainer."""

    def training_step(self, batch, batch_idx):
        factor = 1.0 if self.trainer.global_step < 100 else 0.5
        return factor * cross_entropy(self.net(batch[0]), batch[1])


def test_a_step_that_needs_a_trainer_has_a_remedy(run):
    store, model = run
    loaded, batch = WarmUp(model.net), vectors()[:3]
    with pytest.raises(ValueError, match=r"model\.trainer = pl\.Trainer\(logger=False\)"):
        attribute(store, loaded, batch, progress=False)
    loaded.trainer = pl.Trainer(logger=False, accelerator="cpu", enable_checkpointing=False)
    scores = attribute(store, loaded, batch, progress=False)
    torch.testing.assert_close(scores.values, attribute(store, model, batch, progress=False).values)
