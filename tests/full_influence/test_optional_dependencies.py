"""The error that is raised if an optional dependency is not installed."""

import sys

import pytest
from lightning_models import Plain, loader, mlp, vectors

import tda_lightning.full_influence
from tda_lightning import FullInfluenceFunction, attribute_by_gradients
from tda_lightning.full_influence import ConjugateGradient


def test_solvers_name_their_missing_dependency_and_the_default_needs_none(monkeypatch):
    name = "tda_lightning.full_influence.curvlinops_bindings"
    monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.delattr(tda_lightning.full_influence, "curvlinops_bindings", raising=False)
    monkeypatch.setitem(sys.modules, "curvlinops", None)
    data, method = vectors(), FullInfluenceFunction(ConjugateGradient())
    with pytest.raises(ImportError, match=r"curvlinops.*pip install 'tda_lightning\[solvers\]'"):
        attribute_by_gradients(Plain(mlp()), loader(data), data[:3], method=method, progress=False)
    scores = attribute_by_gradients(Plain(mlp()), loader(data), data[:3], progress=False)
    assert scores.values.shape == (3, len(data))
