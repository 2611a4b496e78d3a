"""Trajectories and top scores: both are the matrix of scores, seen otherwise."""

from dataclasses import dataclass, field

import least_squares as ls
import pytest
import torch
from matplotlib import pyplot
from torch.optim import SGD

from tda_lightning import TRAK, GradientSimilarity, InfluenceFunction, Source, TracIn, Unrolled
from tda_lightning.attribution import EmpiricalFisher
from tda_lightning.attribution.top_scores import top_scores
from tda_lightning.attribution.trajectory import contributions
from tda_lightning.results import Trajectory

RUN = ls.record(ls.problem(steps=8), lambda p: SGD(p, lr=0.1, momentum=0.5))
CHOSEN = [7, 0, 10]
METHODS = [
    TracIn(),
    GradientSimilarity(),
    Unrolled(),
    InfluenceFunction(),
    InfluenceFunction(rows="last visit"),
    Source(),
    TRAK(),
]
each_method = pytest.mark.parametrize("method", METHODS, ids=repr)


def of(method, per="step", chosen=CHOSEN):
    return contributions(RUN, ls.queries(), chosen, method, per=per, progress=False)


@each_method
@pytest.mark.parametrize("per", ["step", "epoch"])
def test_the_sum_over_times_is_the_score(method, per):
    scores = method.attribute(RUN, ls.queries(), progress=False).values
    torch.testing.assert_close(of(method, per).total(), scores[:, CHOSEN])


def test_epochs_add_up_their_steps():
    steps, epochs = of(Unrolled()), of(Unrolled(), "epoch")
    assert steps.times.tolist() == list(range(8))
    assert epochs.times.tolist() == [0, 1]
    torch.testing.assert_close(epochs.values, steps.values.unflatten(2, (2, 4)).sum(dim=3))


def test_nothing_happens_where_a_sample_was_not_drawn():
    found = of(TracIn()).values
    for step in RUN:
        for place, sample in enumerate(CHOSEN):
            drawn = sample in step.sample_ids.tolist()
            assert bool((found[:, place, step.index] != 0).all()) == drawn


def test_ids_may_be_a_tensor_and_must_be_known():
    assert torch.equal(of(TracIn(), chosen=torch.tensor(CHOSEN)).values, of(TracIn()).values)
    with pytest.raises(ValueError, match="Sample 99 is not in the training set"):
        of(TracIn(), chosen=[0, 99])


def test_a_plot_has_a_line_per_sample_that_ends_at_its_score():
    found = of(Unrolled())
    axes = found.plot(query=1)
    ends = [line.get_ydata()[-1] for line in axes.get_lines()[: len(CHOSEN)]]
    assert ends == pytest.approx(found.total()[1].tolist())
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["7", "0", "10"]
    assert found.plot(axes=axes) is axes
    pyplot.close(axes.figure)


def test_it_shows_its_shape_and_method():
    shown = "Trajectory of 3 samples over 8 steps, 3 queries, TracIn(layers=None)"
    assert repr(of(TracIn())) == shown


@each_method
@pytest.mark.parametrize("query_batch_size", [1, 2, 7])
def test_top_scores_are_the_extremes_of_all_scores(method, query_batch_size):
    scores = method.attribute(RUN, ls.queries(), progress=False)
    top = top_scores(
        RUN, ls.queries(), method, 2, query_batch_size=query_batch_size, progress=False
    )
    for found, expected in (
        (top.proponents, scores.proponents(2)),
        (top.opponents, scores.opponents(2)),
    ):
        torch.testing.assert_close(found.values, expected.values)
        assert torch.equal(found.ids, expected.ids)
    assert (top.method, top.provenance) == (scores.method, scores.provenance)


@dataclass(frozen=True)
class Counted(EmpiricalFisher):
    """Notes every step whose curvature is asked for."""

    seen: list[int] = field(default_factory=list, compare=False)

    def scales(self, step):
        self.seen.append(step.index)
        return super().scales(step)


@pytest.mark.parametrize("kind", [InfluenceFunction, Source])
def test_blocks_of_queries_share_what_needs_no_query(kind):
    counted = Counted()
    top_scores(RUN, ls.queries(), kind(curvature=counted), 2, query_batch_size=1, progress=False)
    assert sorted(counted.seen) == [step.index for step in RUN]


@pytest.mark.parametrize("method", [InfluenceFunction(), Source(), TracIn()], ids=repr)
def test_a_settled_method_shows_and_equals_what_it_was(method):
    precomputed = method.precomputed(RUN, ls.queries())
    assert (repr(precomputed), precomputed) == (repr(method), method)


def test_trajectories_are_saved_and_loaded_as_they_were(tmp_path):
    found = of(Unrolled(), "epoch")
    found.save(tmp_path / "when.npz")
    again = Trajectory.load(tmp_path / "when.npz")
    assert (again.per, again.method, again.provenance) == ("epoch", found.method, found.provenance)
    assert all(
        torch.equal(getattr(again, name), getattr(found, name))
        for name in ("values", "times", "train_ids", "query_ids")
    )


def test_a_trajectory_of_one_epoch_can_be_seen():
    run = RUN[:4]
    found = contributions(run, ls.queries(), CHOSEN, TracIn(), per="epoch", progress=False)
    lines = found.plot().get_lines()[: len(CHOSEN)]
    assert [line.get_marker() for line in lines] == ["o"] * len(CHOSEN)
    pyplot.close("all")
