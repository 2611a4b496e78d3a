"""Sparse gradients of embeddings are recorded as dense ones are."""

import pytest
import torch
from lightning_models import Plain, loader, quiet_trainer
from torch import nn
from torch.utils.data import TensorDataset

from tda_lightning import GradientRecorder, Identity
from tda_lightning.stores import MemoryStore

N, USERS, D = 11, 13, 7


class Towers(nn.Module):
    """Two towers whose logits compare every user of the batch with every item."""

    def __init__(self, is_sparse):
        super().__init__()
        torch.manual_seed(3)
        self.users = nn.Embedding(USERS, D, sparse=is_sparse)
        self.items = nn.Embedding(USERS, D, sparse=is_sparse)


class InBatch(Plain):
    """The other items of the batch are the negatives."""

    def training_step(self, batch, batch_idx):
        users, items = batch
        logits = self.net.users(users) @ self.net.items(items).mT
        return nn.functional.cross_entropy(logits, torch.arange(len(users)))


class Pairs(Plain):
    """One term per sample."""

    def training_step(self, batch, batch_idx):
        users, items = batch
        return (self.net.users(users) * self.net.items(items)).sum(dim=1).cos().mean()


def run(model, optimizer, is_sparse):
    generator = torch.Generator().manual_seed(5)
    pairs = torch.randint(USERS, (2, N), generator=generator)
    recorder = GradientRecorder(MemoryStore(), projector=Identity(), audit=1)
    trained = model(Towers(is_sparse).double(), optimizer=lambda p: optimizer(p, lr=0.1))
    quiet_trainer(recorder).fit(trained, loader(TensorDataset(*pairs), N, shuffle=False))
    assert min(audit.explained_in_all() for audit in recorder.store.audits()) > 1 - 1e-12
    return recorder.store


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
@pytest.mark.parametrize("model", [InBatch, Pairs])
@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adagrad])
def test_rows_of_sparse_gradients_equal_those_of_dense_ones(model, optimizer):
    for sparse, dense in zip(
        run(model, optimizer, True), run(model, optimizer, False), strict=True
    ):
        torch.testing.assert_close(sparse.sketch, dense.sketch, rtol=1e-10, atol=1e-13)
        torch.testing.assert_close(sparse.weights, dense.weights)


def test_a_training_with_sparse_adam_is_recorded():
    assert len(run(Pairs, torch.optim.SparseAdam, True)) == 2
