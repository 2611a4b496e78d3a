"""Queries keep their order where `training_step` permutes its batch; other draws are refused."""

import pytest
import torch
from lightning_models import Plain, mlp, quiet_trainer, vectors
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

from tda_lightning import GradientRecorder, Identity, TracIn, attribute
from tda_lightning.passes.queries import identified_rows
from tda_lightning.stores import MemoryStore

N = 7  # As many as entries of a vector.
DATA = vectors(N)
BATCH = DATA.tensors[0].double(), DATA.tensors[1]


class Drawing(Plain):
    """Draws its batch again in training, and with ``order`` in queries."""

    order = torch.arange(N)

    def training_step(self, batch, batch_idx):
        x, y = batch
        order = self.order if len(x) == N else torch.arange(len(x))
        return cross_entropy(self.net(x[order]), y[order])


class Mixing(Plain):
    def training_step(self, batch, batch_idx):
        x, y = batch
        return cross_entropy(self.net(0.9 * x + 0.1 * x.flip(0)), y)


def trained(model_type=Drawing):
    store = MemoryStore()
    model = model_type(mlp().double())
    data = DataLoader([(x.double(), y) for x, y in DATA], batch_size=5)
    quiet_trainer(GradientRecorder(store, projector=Identity())).fit(model, data)
    return store, model


def rows_of(store, model, queries):
    settings = {"preconditioner": None, "mode": "eval", "progress": False}
    return identified_rows(model, queries, store.recipe, labels="given", **settings)


@pytest.mark.parametrize("order", [[3, 0, 1, 6, 5, 4, 2], [6, 5, 4, 3, 2, 1, 0]])
def test_permuted_queries_have_the_rows_and_losses_of_their_order(order):
    store, model = trained()
    expected = rows_of(store, model, BATCH)
    scores = attribute(store, model, BATCH, method=TracIn(), progress=False)
    model.order = torch.tensor(order)
    permuted = rows_of(store, model, BATCH)
    assert torch.allclose(permuted.rows, expected.rows, rtol=1e-12)
    assert torch.allclose(permuted.losses, expected.losses, rtol=1e-12)
    again = attribute(store, model, BATCH, method=TracIn(), progress=False)
    assert torch.allclose(again.values, scores.values, rtol=1e-12)


def test_queries_of_which_some_are_not_drawn_are_refused_unless_they_come_alone():
    store, model = trained()
    expected = rows_of(store, model, BATCH)
    model.order = torch.tensor([3, 0, 1, 3, 5, 4, 2])
    with pytest.raises(ValueError, match=r"(?s)draws from the samples of `queries`.*batch_size=1"):
        rows_of(store, model, BATCH)
    data = DataLoader(list(zip(*BATCH, strict=True)), batch_size=1)
    alone = rows_of(store, model, data)
    assert torch.allclose(alone.rows, expected.rows, rtol=1e-12)


@pytest.mark.filterwarnings("ignore:GradientRecorder. rows of the batch hold two samples")
def test_mixed_queries_are_warned_of():
    store, model = trained(Mixing)
    with pytest.warns(UserWarning, match="Rows of `queries` hold two samples"):
        rows_of(store, model, BATCH)
