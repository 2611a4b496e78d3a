"""Influence functions against retraining ridge regression, and the sizes that do not matter."""

from dataclasses import replace

import least_squares as ls
import pytest
import torch
from torch.optim import SGD

from tda_lightning import InfluenceFunction
from tda_lightning.attribution import BestAvailable, EmpiricalFisher, SampledLabels, damping_of
from tda_lightning.stores import MemoryStore
from tda_lightning.stores.step import Preconditioner

EXACT = InfluenceFunction(SampledLabels(), damping=0.0, rows="last visit")
CONVERGED = ls.everything(ls.problem(steps=400))


def ridge(p):
    return SGD(p, lr=0.2, momentum=0.5, weight_decay=0.3)


def scores(method, run, q=None):
    return method.attribute(run, ls.queries() if q is None else q, progress=False).values


def rebuilt(run, change):
    store = MemoryStore()
    store.begin(run.recipe)
    for step in run:
        store.append(change(step))
    return store


def test_it_is_the_derivative_of_retraining_ridge_regression():
    expected = ls.effect_of_presence(CONVERGED, ridge, ls.queries())
    found = scores(EXACT, ls.record(CONVERGED, ridge))
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)


def test_it_is_leaving_a_share_of_one_out_up_to_the_square_of_that_share():
    found, whole = scores(EXACT, ls.record(CONVERGED, ridge)), ls.train(CONVERGED, ridge)
    errors = []
    for share in (0.2, 0.1):
        presence = torch.ones(ls.N_TRAIN, dtype=torch.float64)
        presence[3] -= share
        lowered = ls.queries() @ (ls.train(CONVERGED, ridge, presence) - whole)
        errors.append((lowered - share * found[:, 3]).abs())
    assert (errors[0] / errors[1]).tolist() == pytest.approx([4, 4, 4], rel=0.1)


def test_gradients_and_curvature_are_averaged_over_the_run():
    run = ls.record(ls.problem(), lambda p: SGD(p, lr=0.1))
    matrix = sum(s.curvature_rows.mT @ s.curvature_rows for s in run) / len(run)
    direction = torch.linalg.solve(matrix + 0.7 * torch.eye(ls.D), ls.queries().mT).mT
    expected = torch.zeros(ls.N_QUERY, ls.N_TRAIN, dtype=torch.float64)
    for sample in range(ls.N_TRAIN):
        own = [3 * step.sketch[step.sample_ids == sample] for step in run]
        if len(torch.cat(own)):
            expected[:, sample] = direction @ torch.cat(own).mean(dim=0) / ls.N_TRAIN
    found = scores(InfluenceFunction(SampledLabels(), damping=0.7), run)
    torch.testing.assert_close(found, expected)


def test_curvature_can_be_that_of_the_last_epoch():
    run = ls.record(ls.problem(steps=8), lambda p: SGD(p, lr=0.1))
    late = InfluenceFunction(damping=0.7, curvature_over="last epoch")
    swapped = InfluenceFunction(damping=0.7, curvature_from=run[4:])
    torch.testing.assert_close(scores(late, run), scores(swapped, run))
    assert not torch.allclose(scores(late, run), scores(InfluenceFunction(damping=0.7), run))


@pytest.mark.parametrize(
    ("momentum", "stride", "time"), [(0.0, 1, 0.7), (0.9, 1, 7.0), (0.0, 3, 2.1)]
)
def test_damping_is_three_halves_over_the_time_of_the_training(momentum, stride, time):
    problem = replace(ls.problem(steps=7), rates=[1.0] * 7)
    run = ls.record(problem, lambda p: SGD(p, lr=0.1, momentum=momentum), stride=stride)
    torch.testing.assert_close(
        scores(InfluenceFunction(), run), scores(InfluenceFunction(damping=1.5 / time), run)
    )


def test_it_does_not_matter_whether_losses_are_means_or_sums():
    def as_sum(step):
        group = replace(step.groups[0], lr=step.lr / 3)
        return replace(
            step,
            groups=(group,),
            weights=3 * step.weights,
            sketch=3 * step.sketch,
            curvature_rows=3**0.5 * step.curvature_rows,
        )

    mean = ls.record(ls.problem(), lambda p: SGD(p, lr=0.1))
    torch.testing.assert_close(
        scores(InfluenceFunction(), rebuilt(mean, as_sum)), scores(InfluenceFunction(), mean)
    )


def test_rows_and_curvature_may_come_from_other_recordings():
    run, other = (ls.record(ls.problem(seed=s), lambda p: SGD(p, lr=0.1)) for s in (0, 1))
    method = InfluenceFunction(damping=0.7, rows_from=other, curvature_from=other)
    torch.testing.assert_close(scores(method, run), scores(InfluenceFunction(damping=0.7), other))


@pytest.mark.parametrize("argument", ["rows_from", "curvature_from"])
@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"projector": {"name": "CountSketch", "seed": 5}}, "its projector is {'name': 'CountSk"),
        ({"dimension": 7}, "its dimension is 7, the run's is 5"),
        ({"preconditioner": "optimizer"}, "its preconditioner is 'optimizer', the run's is 'none'"),
    ],
    ids=["projector", "dimension", "coordinates"],
)
def test_recordings_that_were_sketched_otherwise_are_refused(argument, other, said):
    run, strange = ls.record(ls.problem(), lambda p: SGD(p, lr=0.1)), MemoryStore()
    strange.begin(replace(run.recipe, **other))
    with pytest.raises(ValueError, match=f"`{argument}` was not sketched as the run was: {said}"):
        scores(InfluenceFunction(**{argument: strange}), run)


def test_recordings_without_steps_are_refused():
    run = ls.record(ls.problem(), lambda p: SGD(p, lr=0.1))
    with pytest.raises(ValueError, match="`curvature_from` holds no step; expected one"):
        scores(InfluenceFunction(curvature_from=run[:0]), run)


def test_a_training_that_did_not_move_gives_no_damping():
    still = ls.record(replace(ls.problem(steps=9), rates=[0.0] * 9), lambda p: SGD(p, lr=0.1))
    with pytest.raises(ValueError, match="sum to 0, and a damping follows from that sum"):
        scores(InfluenceFunction(), still)


def test_scores_say_that_curvature_came_from_elsewhere():
    run = ls.record(ls.problem(), lambda p: SGD(p, lr=0.1))
    found = InfluenceFunction(curvature_from=run[:2]).attribute(run, ls.queries(), progress=False)
    assert "curvature_from=StoreSlice(2 steps), rows_from=None" in found.method


def test_rows_from_a_recording_of_other_data_are_refused():
    run = ls.record(ls.problem(), lambda p: SGD(p, lr=0.1))
    other = rebuilt(run, lambda step: replace(step, sample_ids=step.sample_ids + 20))
    with pytest.raises(ValueError, match=r"Sample 2\d is not in the training set.*expected the 11"):
        scores(InfluenceFunction(rows_from=other), run)


@pytest.mark.parametrize("rows", ["all visits", "last visit"])
def test_self_influence_is_a_sample_as_its_own_query(rows):
    run = ls.record(ls.everything(ls.problem(steps=1)), lambda p: SGD(p, lr=0.1))
    method = InfluenceFunction(EmpiricalFisher(), rows=rows)
    own = method.self_influence(run, progress=False).values
    values = scores(method, run, ls.N_TRAIN * run[0].sketch)
    torch.testing.assert_close(own, values.diagonal())


def test_it_is_linear_in_the_query_and_blind_to_samples_never_drawn():
    run = ls.record(ls.problem(), lambda p: SGD(p, lr=0.1))
    one, other = ls.queries(1), ls.queries(2)
    method = InfluenceFunction(BestAvailable(), rows="last visit")
    torch.testing.assert_close(
        scores(method, run, 2 * one - other),
        2 * scores(method, run, one) - scores(method, run, other),
    )
    assert scores(method, run)[:, ls.N_TRAIN - 1].abs().max() == 0


def test_a_curvature_without_an_inverse_is_refused():
    run = ls.record(ls.problem(steps=1), lambda p: SGD(p, lr=0.1))
    with pytest.raises(ValueError, match="without an inverse; expected more"):
        scores(InfluenceFunction(BestAvailable(), damping=0.0), run)


@pytest.mark.parametrize("decay", [0.0, 0.3])
def test_the_damping_of_a_run_is_what_the_default_adds(decay):
    run = ls.record(ls.problem(), lambda p: SGD(p, lr=0.1, momentum=0.5, weight_decay=decay))
    same = InfluenceFunction(damping=damping_of(run) - decay)  # which it adds by itself
    torch.testing.assert_close(scores(same, run), scores(InfluenceFunction(), run))


def test_the_damping_of_a_run_in_other_coordinates_is_refused():
    def with_factors(step):
        return replace(step, preconditioner=Preconditioner(torch.ones(2), torch.ones(3)))

    run = rebuilt(ls.record(ls.problem(), lambda p: SGD(p, lr=0.1)), with_factors)
    with pytest.raises(ValueError, match=r"coordinates of its `SGD`.*Pass a number"):
        damping_of(run)


def adaptive(run):
    return rebuilt(run, lambda step: replace(step, optimizer="Adamax"))


def test_rates_of_which_no_damping_follows_are_warned_of():
    run = adaptive(ls.record(ls.problem(), lambda p: SGD(p, lr=0.1)))
    with pytest.warns(UserWarning, match="Steps of Adamax are not known to be gradient steps"):
        scores(InfluenceFunction(), run)
    scores(InfluenceFunction(damping=0.7), run)  # nothing follows from the rates
    with pytest.raises(ValueError, match="coordinates of its `Adamax`"):
        damping_of(run)
