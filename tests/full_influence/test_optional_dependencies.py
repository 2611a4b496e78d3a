"""The error that is raised if an optional dependency is not installed."""

import sys

import pytest
from lightning_models import Plain, loader, mlp, vectors

import tda_lightning.full_influence
from tda_lightning import FullInfluenceFunction, attribute_by_gradients
from tda_lightning.full_influence import EKFAC, ConjugateGradient


@pytest.mark.parametrize(
    ("solver", "library", "module"),
    [
        (EKFAC(), "curvlinops", "curvlinops_bindings"),
        (ConjugateGradient(), "scipy.sparse.linalg", "eigenvalues"),
    ],
    ids=["EKFAC", "ConjugateGradient"],
)
def test_solvers_name_their_missing_dependency_and_the_default_needs_none(
    solver, library, module, monkeypatch
):
    monkeypatch.delitem(sys.modules, f"tda_lightning.full_influence.{module}", raising=False)
    monkeypatch.delattr(tda_lightning.full_influence, module, raising=False)
    monkeypatch.setitem(sys.modules, library, None)
    data, method = vectors(), FullInfluenceFunction(solver)
    with pytest.raises(ImportError, match=rf"{library}.*pip install 'tda_lightning\[solvers\]'"):
        attribute_by_gradients(Plain(mlp()), loader(data), data[:3], method=method, progress=False)
    scores = attribute_by_gradients(Plain(mlp()), loader(data), data[:3], progress=False)
    assert scores.values.shape == (3, len(data))
