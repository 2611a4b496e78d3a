"""Several loaders at once are recorded if the model sees their samples in one call."""

import pytest
import torch
from lightning_models import IndexedVectors, Plain, loader, mlp, quiet_trainer, vectors
from pytorch_lightning.utilities import CombinedLoader
from torch.nn import functional

from tda_lightning import GradientRecorder, Identity, attribute
from tda_lightning.stores import MemoryStore


class Joined(Plain):
    """Passes the samples of both loaders through the network in one call."""

    def training_step(self, batch, batch_idx):
        parts = [part for part in batch.values() if part is not None]
        x, y = (torch.cat(each) for each in zip(*parts, strict=True))
        return functional.cross_entropy(self.net(x), y)


def ids_of(batch):
    parts = [batch["a"][0][:, 0], batch["b"][0][:, 0] + 100]
    return torch.cat(parts).long()


def both(mode):
    loaders = {"a": loader(IndexedVectors()), "b": loader(IndexedVectors(), batch_size=3)}
    return CombinedLoader(loaders, mode)


@pytest.mark.parametrize("mode", ["min_size", "max_size_cycle"])
def test_samples_of_two_loaders_in_one_call_are_recorded(mode):
    store, model = MemoryStore(), Joined(mlp())
    recorder = GradientRecorder(store, sample_ids=ids_of, projector=Identity(), audit=1)
    quiet_trainer(recorder).fit(model, both(mode))
    assert set(store.train_ids().tolist()) <= {*range(13), *range(100, 113)}
    assert max(store.train_ids().tolist()) >= 100
    assert all(float(audit.explained().min()) > 0.9999 for audit in store.audits())
    queries = {"a": vectors()[:2], "b": vectors()[2:5]}
    x, y = (torch.cat(each) for each in zip(*queries.values(), strict=True))
    scores = attribute(store, model, {"a": (x, y)}, progress=False)
    assert scores.values.shape == (5, len(store.train_ids()))


def test_ids_of_one_loader_alone_are_warned_of_once():
    class OfPairs(Joined):
        def training_step(self, batch, batch_idx):
            (x, y), (other_x, other_y) = batch["a"], batch["b"]
            own = functional.cross_entropy(self.net(x), y)
            return own + functional.cross_entropy(self.net(other_x), other_y)

    recorder = GradientRecorder(MemoryStore(), sample_ids=lambda batch: batch["a"][0][:, 0].long())
    pairs = {"a": loader(IndexedVectors(), 3), "b": loader(IndexedVectors(), 3)}
    with pytest.warns(UserWarning, match="3 ids for a batch of 6 samples from several") as caught:
        quiet_trainer(recorder).fit(OfPairs(mlp()), CombinedLoader(pairs, "min_size"))
    assert sum("several loaders" in str(warning.message) for warning in caught) == 1


def test_several_calls_are_refused_with_a_remedy():
    class Apart(Joined):
        def training_step(self, batch, batch_idx):
            return sum(functional.cross_entropy(self.net(x), y) for x, y in batch.values())

    recorder = GradientRecorder(MemoryStore(), sample_ids=ids_of)
    with pytest.raises(ValueError, match="one call"):
        quiet_trainer(recorder).fit(Apart(mlp()), both("min_size"))
