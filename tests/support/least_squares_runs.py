"""Recorded runs of small trainings, and the methods that model their optimizer steps."""

import least_squares as ls
import pytest
import torch
from lightning_models import Plain, loader, mlp, quiet_trainer, vectors
from torch.optim import SGD
from torch.utils.data import TensorDataset

from tda_lightning import GradientRecorder, Identity, Source, Unrolled
from tda_lightning.stores import MemoryStore

METHODS = pytest.mark.parametrize("method", [Unrolled(), Source(2)], ids=["unrolled", "source"])


def scores(method, run, q=None):
    return method.attribute(run, ls.queries() if q is None else q, progress=False).values


def plain_run(momentum=0.0):
    return ls.record(ls.problem(), lambda p: SGD(p, lr=0.05, momentum=momentum))


def record(optimizer, network=mlp, data=None, **settings):
    """Train and record in double precision, so that equal results agree up to rounding."""
    store, model = MemoryStore(), Plain(network().double(), optimizer=optimizer)
    torch.manual_seed(0)
    x, y = (data or vectors()).tensors
    trainer = quiet_trainer(
        GradientRecorder(store, projector=Identity(), **settings), precision="64-true"
    )
    trainer.fit(model, loader(TensorDataset(x.double(), y)))
    return store, model
