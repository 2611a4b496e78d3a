"""Passes over data that are recorded without training, and the methods that accept them."""

import pytest
import torch
from lightning_models import Plain, loader, mlp, quiet_trainer, vectors
from torch.utils.data import Subset
from unchecked_calls import require_error

from tda_lightning import (
    GradientRecorder,
    GradientSimilarity,
    HDF5Store,
    InfluenceFunction,
    Source,
    TracIn,
    Unrolled,
    attribute,
    record,
)
from tda_lightning.stores import MemoryStore

DATA = vectors()


def trained_model_and_pass():
    store, model = MemoryStore(), Plain(mlp())
    quiet_trainer(GradientRecorder(store)).fit(model, loader(DATA))
    return model, record(model, loader(DATA), like=store, progress=False)


@pytest.mark.parametrize(
    "method", [TracIn(), Unrolled(), Source(), InfluenceFunction()], ids=lambda m: type(m).__name__
)
def test_methods_of_trainings_refuse_a_pass_without_training(method):
    model, later = trained_model_and_pass()
    with pytest.raises(ValueError, match="recorded without training: its steps did not move"):
        attribute(later, model, DATA[:3], method=method, progress=False)


def test_gradients_of_a_pass_can_be_compared():
    model, later = trained_model_and_pass()
    for method in (GradientSimilarity(), InfluenceFunction(damping=0.7)):
        assert attribute(later, model, DATA[:3], method=method, progress=False).values.any()


def test_rows_of_a_pass_are_in_its_stored_coordinates():
    store = MemoryStore()
    model = Plain(mlp(), optimizer=lambda p: torch.optim.Adam(p, lr=0.01))
    quiet_trainer(GradientRecorder(store)).fit(model, loader(DATA))
    early = store.preconditioner(0)
    assert not torch.equal(early.rows, store.preconditioner().rows)
    ordered = loader(DATA, shuffle=False)
    later = record(model, ordered, like=store, at=0, progress=False)
    assert torch.equal(later.preconditioner().rows, early.rows)
    again = record(model, ordered, like=later, progress=False)
    for first, second in zip(later, again, strict=True):
        torch.testing.assert_close(first.sketch, second.sketch)


def test_a_pass_is_recorded_like_the_run_at_a_path(tmp_path):
    model = Plain(mlp())
    quiet_trainer(GradientRecorder(tmp_path / "run.tda")).fit(model, loader(DATA))
    ordered, path = loader(DATA, shuffle=False), tmp_path / "run.tda"
    like_store = record(model, ordered, like=HDF5Store.open(path), progress=False)
    for like in (path, str(path)):
        like_path = record(model, ordered, like=like, progress=False)
        for step, expected in zip(like_path, like_store, strict=True):
            assert torch.equal(step.sketch, expected.sketch)


@pytest.mark.parametrize("data", [Subset(DATA, []), Subset(DATA, [3])], ids=["none", "too few"])
def test_an_empty_loader_is_refused_and_leaves_the_store_empty(data):
    model, later = trained_model_and_pass()
    empty, store = loader(data, shuffle=False, drop_last=True), MemoryStore()
    with pytest.raises(ValueError, match="`loader` is an empty loader; expected at least one"):
        record(model, empty, like=later, store=store, progress=False)
    assert store.run_id is None
    record(model, loader(DATA), like=later, store=store, progress=False)


CALLS = """
calls = {
    "misspelt labels": lambda: record(model, batches, like=store, labels="sample"),
    "another mode": lambda: record(model, batches, like=store, mode="training"),
    "a missing step": lambda: record(model, batches, like=store, at=99),
    "a string as step": lambda: record(model, batches, like=store, at="now"),
    "several runs": lambda: record(model, batches, like=[store]),
    "a path as store": lambda: record(model, batches, like=store, store="pass.tda"),
    "a run without steps": lambda: record(model, batches, like=store[:0]),
}
"""
EXPECTED = {
    "misspelt labels": "`labels` is 'sample'; expected one of 'given', 'sampled'.",
    "another mode": "`mode` is 'training'; expected one of 'eval', 'train'.",
    "a missing step": "`at` is 99, and `like` has 6 steps; expected the position of a step",
    "a string as step": "`at` is 'now', and `like` has 6 steps; expected the position of a step",
    "several runs": "`like` is a `list`; expected the folder of a recorded run, or its store.",
    "a path as store": "`store` is 'pass.tda'; expected an object such as `HDF5Store(",
    "a run without steps": "`like` has 0 steps",
}


@pytest.mark.parametrize("name", EXPECTED)
def test_wrong_arguments_raise_errors_that_name_them(name):
    require_error(CALLS, name, EXPECTED[name])
