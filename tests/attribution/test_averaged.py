"""The mean of several methods, against the methods one by one."""

from dataclasses import dataclass

import least_squares as ls
import pytest
import torch
from torch.optim import SGD

from tda_lightning import (
    TRAK,
    GradientSimilarity,
    InfluenceFunction,
    TracIn,
    Unrolled,
    embed,
)
from tda_lightning.attribution import Attributor, Averaged, SampledLabels
from tda_lightning.stores import MemoryStore

RUN = ls.record(ls.problem(steps=8), lambda p: SGD(p, lr=0.1, momentum=0.5))
OTHER = ls.record(ls.problem(seed=1), lambda p: SGD(p, lr=0.1))
PAIR = (Unrolled(SampledLabels()), InfluenceFunction(damping=0.7))


def scores(method, run=RUN):
    return method.attribute(run, ls.queries(), progress=False)


@pytest.mark.parametrize("methods", [PAIR, (*PAIR, TracIn()), PAIR[:1]], ids=len)
def test_scores_are_the_mean_of_the_methods_scores(methods):
    parts = torch.stack([scores(method).values for method in methods])
    torch.testing.assert_close(scores(Averaged(methods)).values, parts.mean(dim=0))


def test_the_default_is_unrolled_and_the_influence_function():
    expected = (scores(Unrolled()).values + scores(InfluenceFunction()).values) / 2
    torch.testing.assert_close(scores(Averaged()).values, expected)


@pytest.mark.filterwarnings("ignore:The scores of .* times as large")
def test_several_runs_are_averaged_by_each_method_in_its_own_way():
    """TRAK, for example, multiplies two means."""
    methods, rows = (TRAK(), Unrolled()), [ls.queries(), ls.queries()]
    parts = [m.attribute_ensemble([RUN, OTHER], rows, progress=False).values for m in methods]
    mean = Averaged(methods).attribute_ensemble([RUN, OTHER], rows, progress=False)
    torch.testing.assert_close(mean.values, torch.stack(parts).mean(dim=0))


@dataclass(frozen=True)
class Enlarged(Attributor):
    """Scores of another method, multiplied by a number."""

    method: Attributor
    factor: float

    def directions(self, run, queries):
        yield from self.method.directions(run, self.factor * queries)


def test_a_method_whose_scores_count_alone_is_named():
    expected = r"`Enlarged\(.*are more than 10 times as large as those of `Unrolled\(\)`"
    with pytest.warns(UserWarning, match=expected):
        scores(Averaged((Unrolled(), Enlarged(Unrolled(), 11.0))))
    scores(Averaged((Unrolled(), Enlarged(Unrolled(), 9.0))))  # It raises no warning.


def test_it_is_linear_if_all_methods_are():
    assert Averaged().is_linear()
    assert not Averaged((Unrolled(), GradientSimilarity())).is_linear()
    with pytest.raises(ValueError, match="is not linear in the query"):
        embed(RUN, Averaged((GradientSimilarity(),)))


def test_a_run_must_suit_all_methods():
    with pytest.raises(ValueError, match="The run has no steps"):
        Averaged().require(MemoryStore())
    with pytest.raises(ValueError, match=r"sum to 0.*pass `damping=`"):
        scores(Averaged(), ls.record(ls.problem(), lambda p: SGD(p, lr=0.0)))


def test_its_name_is_what_one_types():
    shown = "Averaged((Unrolled(curvature=SampledLabels()), InfluenceFunction()))"
    method = Averaged((Unrolled(SampledLabels()), InfluenceFunction()))
    assert repr(method) == scores(method).method == shown
    assert eval(shown) == method
    assert eval(repr(Averaged(PAIR[:1]))) == Averaged(PAIR[:1])


def test_the_provenance_is_that_of_one_pass():
    assert scores(Averaged()).provenance == scores(Unrolled()).provenance


def test_it_has_no_directions():
    with pytest.raises(ValueError, match="has no directions; expected a method that has them"):
        Averaged().directions(RUN, ls.queries())
