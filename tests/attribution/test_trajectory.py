"""Trajectories and top scores, against the full matrix of scores."""

from dataclasses import dataclass, field, replace
from inspect import signature

import least_squares as ls
import pytest
import torch
from matplotlib import pyplot
from torch.optim import SGD

from tda_lightning import TRAK, GradientSimilarity, InfluenceFunction, Source, TracIn, Unrolled
from tda_lightning.attribution import Averaged, EmpiricalFisher
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
    Averaged(),
    Averaged((TracIn(), InfluenceFunction(rows="last visit"))),
]
each_method = pytest.mark.parametrize("method", METHODS, ids=repr)


def trajectory_of(method, per="step", run=RUN):
    return contributions(run, ls.queries(), torch.tensor(CHOSEN), method, per=per, progress=False)


@each_method
@pytest.mark.parametrize("per", ["step", "epoch"])
def test_the_sum_over_times_is_the_score(method, per):
    scores = method.attribute(RUN, ls.queries(), progress=False).values
    torch.testing.assert_close(trajectory_of(method, per).total(), scores[:, CHOSEN])


def test_epochs_add_up_their_steps():
    steps, epochs = trajectory_of(Unrolled()), trajectory_of(Unrolled(), "epoch")
    assert steps.times.tolist() == list(range(8))
    assert epochs.times.tolist() == [0, 1]
    torch.testing.assert_close(epochs.values, steps.values.unflatten(2, (2, 4)).sum(dim=3))


def test_contributions_are_zero_in_steps_that_did_not_draw_the_sample():
    values = trajectory_of(TracIn()).values
    for step in RUN:
        for position, sample in enumerate(CHOSEN):
            drawn = sample in step.sample_ids.tolist()
            assert bool((values[:, position, step.index] != 0).all()) == drawn


def test_a_plot_has_a_line_per_sample_that_ends_at_its_score():
    trajectory = trajectory_of(Unrolled())
    axes = trajectory.plot(query=1)
    ends = [line.get_ydata()[-1] for line in axes.get_lines()[: len(CHOSEN)]]
    assert ends == pytest.approx(trajectory.total()[1].tolist())
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["7", "0", "10"]
    assert trajectory.plot(axes=axes) is axes
    pyplot.close(axes.figure)


def test_many_samples_are_drawn_without_a_legend():
    ids = torch.arange(11)
    trajectory = Trajectory(torch.rand(1, 11, 3), torch.arange(3), ids, ids[:1], "step", "")
    axes = trajectory.plot()
    assert axes.get_legend() is None
    pyplot.close(axes.figure)


def test_repr_shows_shape_and_method():
    expected = "Trajectory of 3 samples over 8 steps, 3 queries, TracIn(layers=None)"
    assert repr(trajectory_of(TracIn())) == expected


@each_method
@pytest.mark.parametrize("query_batch_size", [1, 2, 7])
def test_top_scores_are_the_extremes_of_all_scores(method, query_batch_size):
    scores = method.attribute(RUN, ls.queries(), progress=False)
    top = top_scores(
        RUN, ls.queries(), method, 2, query_batch_size=query_batch_size, progress=False
    )
    for ranking, expected in (
        (top.proponents, scores.proponents(2)),
        (top.opponents, scores.opponents(2)),
    ):
        torch.testing.assert_close(ranking.values, expected.values)
        assert torch.equal(ranking.ids, expected.ids)
    assert (top.method, top.provenance) == (scores.method, scores.provenance)


@dataclass(frozen=True)
class LoggedFisher(EmpiricalFisher):
    """Empirical Fisher that logs the steps for which it is computed."""

    indices: list[int] = field(default_factory=list, compare=False)

    def scales(self, step):
        self.indices.append(step.index)
        return super().scales(step)


@pytest.mark.parametrize("method_class", [InfluenceFunction, Source])
def test_batches_of_queries_share_the_curvature(method_class):
    curvature = LoggedFisher()
    top_scores(
        RUN, ls.queries(), method_class(curvature=curvature), 2, query_batch_size=1, progress=False
    )
    assert sorted(curvature.indices) == [step.index for step in RUN]


@pytest.mark.parametrize("method", [InfluenceFunction(), Source(), TracIn()], ids=repr)
def test_a_precomputed_method_has_the_repr_of_and_equals_the_original(method):
    precomputed = method.precomputed(RUN, ls.queries())
    assert (repr(precomputed), precomputed) == (repr(method), method)


@each_method
def test_a_signature_has_hyper_parameters_only(method):
    assert not [name for name in signature(type(method)).parameters if name.startswith("_")]


def test_another_damping_does_not_meet_the_factor_of_the_first():
    stiff = replace(InfluenceFunction().precomputed(RUN, ls.queries()), damping=7.0)
    scores = stiff.attribute(RUN, ls.queries(), progress=False).values
    again = InfluenceFunction(damping=7.0).attribute(RUN, ls.queries(), progress=False).values
    torch.testing.assert_close(scores, again)


def test_a_precomputed_influence_function_has_the_self_influence_of_the_original():
    method = InfluenceFunction()
    shared = method.precomputed(RUN, ls.queries()).self_influence(RUN, progress=False).values
    torch.testing.assert_close(shared, method.self_influence(RUN, progress=False).values)


def test_a_saved_trajectory_can_be_loaded(tmp_path):
    saved = trajectory_of(Unrolled(), "epoch")
    saved.save(tmp_path / "when.npz")
    loaded = Trajectory.load(tmp_path / "when.npz")
    assert loaded.per == "epoch"
    assert (loaded.method, loaded.provenance) == (saved.method, saved.provenance)
    assert all(
        torch.equal(getattr(loaded, name), getattr(saved, name))
        for name in ("values", "times", "train_ids", "query_ids")
    )


def test_a_trajectory_of_one_epoch_is_plotted_with_markers():
    run = RUN[:4]
    trajectory = trajectory_of(TracIn(), "epoch", run=run)
    lines = trajectory.plot().get_lines()[: len(CHOSEN)]
    assert [line.get_marker() for line in lines] == ["o"] * len(CHOSEN)
    pyplot.close("all")
