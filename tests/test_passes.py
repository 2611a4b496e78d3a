"""Passes that were recorded without training: what they can and cannot be asked."""

import pytest
from lightning_models import Plain, loader, mlp, quiet_trainer, vectors

from tda_lightning import (
    GradientRecorder,
    GradientSimilarity,
    InfluenceFunction,
    MemoryStore,
    Source,
    TracIn,
    Unrolled,
    attribute,
    record,
)

DATA = vectors()


def trained_and_recorded_anew():
    store, model = MemoryStore(), Plain(mlp())
    quiet_trainer(GradientRecorder(store)).fit(model, loader(DATA))
    return model, record(model, loader(DATA), like=store, progress=False)


@pytest.mark.parametrize(
    "method", [TracIn(), Unrolled(), Source(), InfluenceFunction()], ids=lambda m: type(m).__name__
)
def test_a_pass_is_not_asked_as_a_training(method):
    model, later = trained_and_recorded_anew()
    with pytest.raises(ValueError, match="recorded without training: its steps moved nothing"):
        attribute(later, model, DATA[:3], method=method, progress=False)


def test_gradients_of_a_pass_can_be_compared():
    model, later = trained_and_recorded_anew()
    for method in (GradientSimilarity(), InfluenceFunction(damping=0.7)):
        assert attribute(later, model, DATA[:3], method=method, progress=False).values.any()
