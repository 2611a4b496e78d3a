"""Influence functions, against retraining of ridge regression; damping, and invariances."""

from dataclasses import replace

import least_squares as ls
import pytest
import torch
from torch.optim import SGD

from tda_lightning import InfluenceFunction, Unrolled
from tda_lightning.attribution import (
    Averaged,
    BestAvailable,
    EmpiricalFisher,
    SampledLabels,
    damping_of,
)
from tda_lightning.stores import MemoryStore
from tda_lightning.stores.step import Preconditioner

EXACT = InfluenceFunction(SampledLabels(), damping=0.0, rows="last visit")
CONVERGED = ls.full_batches(ls.problem(steps=400))


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


def test_scores_are_the_derivative_of_retraining_ridge_regression():
    expected = ls.effect_of_presence(CONVERGED, ridge, ls.queries())
    values = scores(EXACT, ls.record(CONVERGED, ridge))
    torch.testing.assert_close(values, expected, rtol=1e-6, atol=1e-9)


def test_scores_match_partial_leave_one_out_up_to_second_order():
    values, weights = scores(EXACT, ls.record(CONVERGED, ridge)), ls.train(CONVERGED, ridge)
    errors = []
    for share in (0.2, 0.1):
        presence = torch.ones(ls.N_TRAIN, dtype=torch.float64)
        presence[3] -= share
        lowered = ls.queries() @ (ls.train(CONVERGED, ridge, presence) - weights)
        errors.append((lowered - share * values[:, 3]).abs())
    assert (errors[0] / errors[1]).tolist() == pytest.approx([4, 4, 4], rel=0.1)


def test_gradients_and_curvature_are_averaged_over_the_run():
    run = ls.record(ls.problem(), lambda p: SGD(p, lr=0.1))
    matrix = sum(s.curvature_rows.mT @ s.curvature_rows for s in run) / len(run)
    direction = torch.linalg.solve(matrix + 0.7 * torch.eye(ls.D), ls.queries().mT).mT
    expected = torch.zeros(ls.N_QUERY, ls.N_TRAIN, dtype=torch.float64)
    for sample in range(ls.N_TRAIN):
        gradients = [3 * step.sketch[step.sample_ids == sample] for step in run]
        if len(torch.cat(gradients)):
            expected[:, sample] = direction @ torch.cat(gradients).mean(dim=0) / ls.N_TRAIN
    values = scores(InfluenceFunction(SampledLabels(), damping=0.7), run)
    torch.testing.assert_close(values, expected)


def test_curvature_can_be_averaged_over_the_last_epoch():
    run = ls.record(ls.problem(steps=8), lambda p: SGD(p, lr=0.1))
    last_epoch = InfluenceFunction(damping=0.7, curvature_over="last epoch")
    sliced = InfluenceFunction(damping=0.7, curvature_from=run[4:])
    torch.testing.assert_close(scores(last_epoch, run), scores(sliced, run))
    assert not torch.allclose(scores(last_epoch, run), scores(InfluenceFunction(damping=0.7), run))


@pytest.mark.parametrize(
    ("momentum", "stride", "total_lr"), [(0.0, 1, 0.7), (0.9, 1, 7.0), (0.0, 3, 2.1)]
)
def test_the_default_damping_is_three_halves_over_the_sum_of_rates(momentum, stride, total_lr):
    problem = replace(ls.problem(steps=7), rates=[1.0] * 7)
    run = ls.record(problem, lambda p: SGD(p, lr=0.1, momentum=momentum), stride=stride)
    torch.testing.assert_close(
        scores(InfluenceFunction(), run), scores(InfluenceFunction(damping=1.5 / total_lr), run)
    )


def test_scores_do_not_depend_on_whether_losses_are_means_or_sums():
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


@pytest.mark.parametrize("size", [1.0, 1e3, 1e5, 1e6])
@pytest.mark.parametrize("method", ["attribute", "precomputed", "self-influence"])
def test_a_damping_far_below_the_curvature_is_not_lost_in_rounding(size, method):
    """Scores of single-precision runs are those in double, also for curvatures of 1e12."""
    direction = size * torch.tensor([0.3, -0.7, 0.2, 0.5, 0.4])

    def along_one_direction(dtype):
        def change(step):
            generator = torch.Generator().manual_seed(step.index)
            rows = torch.randn(3, 1, generator=generator) * direction
            return replace(
                step, sketch=step.sketch.float().to(dtype), curvature_rows=rows.to(dtype)
            )

        return change

    def values(dtype):
        run = rebuilt(plain, along_one_direction(dtype))
        influence = InfluenceFunction(SampledLabels())
        queries = ls.queries().float().to(dtype)
        if method == "self-influence":
            return influence.self_influence(run, progress=False).values
        if method == "precomputed":
            influence = influence.precomputed(run, queries)
        return scores(influence, run, queries)

    plain = ls.record(ls.problem(), lambda p: SGD(p, lr=0.1))
    single, double = values(torch.float32), values(torch.float64)
    assert single.dtype == torch.float32 or method == "self-influence"
    torch.testing.assert_close(single.double(), double, rtol=1e-4, atol=1e-4 * float(double.std()))


def test_rows_too_long_for_their_matrices_are_refused_with_a_remedy():
    run, wide = ls.record(ls.problem(), ridge), MemoryStore()
    wide.begin(replace(run.recipe, dimension=60_000, dtype="float32"))
    wide.append(run[0])
    with pytest.raises(ValueError, match=r"60,000 x 60,000 numbers, 43\.2 GB; expected at most 8"):
        Averaged().require(wide)
    Unrolled().require(wide)
    InfluenceFunction(max_gb=50.0).require(wide)
    with pytest.raises(ValueError, match="`max_gb` is 0"):
        InfluenceFunction(max_gb=0.0)


@pytest.mark.parametrize("argument", ["rows_from", "curvature_from"])
@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ({"projector": {"name": "CountSketch", "seed": 5}}, "its projector is {'name': 'CountSk"),
        ({"dimension": 7}, "its dimension is 7, the run's is 5"),
        ({"preconditioner": "optimizer"}, "its preconditioner is 'optimizer', the run's is 'none'"),
    ],
    ids=["projector", "dimension", "coordinates"],
)
def test_recordings_with_another_sketch_are_refused(argument, recipe, message):
    run, other = ls.record(ls.problem(), lambda p: SGD(p, lr=0.1)), MemoryStore()
    other.begin(replace(run.recipe, **recipe))
    with pytest.raises(ValueError, match=f"`{argument}` was not sketched like the run: {message}"):
        scores(InfluenceFunction(**{argument: other}), run)


def test_recordings_without_steps_are_refused():
    run = ls.record(ls.problem(), lambda p: SGD(p, lr=0.1))
    with pytest.raises(ValueError, match="`curvature_from` holds no steps; expected at least one"):
        scores(InfluenceFunction(curvature_from=run[:0]), run)


def test_a_training_at_rate_zero_has_no_default_damping():
    still = ls.record(replace(ls.problem(steps=9), rates=[0.0] * 9), lambda p: SGD(p, lr=0.1))
    with pytest.raises(
        ValueError, match="sum to 0, and the default damping is derived from that sum"
    ):
        scores(InfluenceFunction(), still)


def test_the_method_in_scores_names_the_recording_of_the_curvature():
    run = ls.record(ls.problem(), lambda p: SGD(p, lr=0.1))
    method = InfluenceFunction(curvature_from=run[:2])
    method_of_scores = method.attribute(run, ls.queries(), progress=False).method
    assert "curvature_from=StoreSlice(2 steps), rows_from=None" in method_of_scores


def test_rows_from_a_recording_of_other_data_are_refused():
    run = ls.record(ls.problem(), lambda p: SGD(p, lr=0.1))
    other = rebuilt(run, lambda step: replace(step, sample_ids=step.sample_ids + 20))
    with pytest.raises(ValueError, match=r"Sample 2\d is not in the training set.*expected the 11"):
        scores(InfluenceFunction(rows_from=other), run)


@pytest.mark.parametrize("rows", ["all visits", "last visit"])
def test_self_influence_is_the_score_of_a_sample_for_itself_as_query(rows):
    run = ls.record(ls.full_batches(ls.problem(steps=1)), lambda p: SGD(p, lr=0.1))
    method = InfluenceFunction(EmpiricalFisher(), rows=rows)
    self_scores = method.self_influence(run, progress=False).values
    values = scores(method, run, ls.N_TRAIN * run[0].sketch)
    torch.testing.assert_close(self_scores, values.diagonal())


def test_scores_are_linear_in_the_query_and_zero_for_samples_never_drawn():
    run = ls.record(ls.problem(), lambda p: SGD(p, lr=0.1))
    q1, q2 = ls.queries(1), ls.queries(2)
    method = InfluenceFunction(BestAvailable(), rows="last visit")
    torch.testing.assert_close(
        scores(method, run, 2 * q1 - q2),
        2 * scores(method, run, q1) - scores(method, run, q2),
    )
    assert scores(method, run)[:, ls.N_TRAIN - 1].abs().max() == 0


def test_a_singular_curvature_is_refused():
    run = ls.record(ls.problem(steps=1), lambda p: SGD(p, lr=0.1))
    with pytest.raises(
        ValueError, match="damped 5 x 5 curvature matrix is not positive definite; expected"
    ):
        scores(InfluenceFunction(BestAvailable(), damping=0.0), run)


@pytest.mark.parametrize("decay", [0.0, 0.3])
def test_the_damping_of_a_run_is_the_default(decay):
    run = ls.record(ls.problem(), lambda p: SGD(p, lr=0.1, momentum=0.5, weight_decay=decay))
    # The method adds the weight decay to a given damping.
    explicit = InfluenceFunction(damping=damping_of(run) - decay)
    torch.testing.assert_close(scores(explicit, run), scores(InfluenceFunction(), run))


def test_the_damping_of_a_run_in_other_coordinates_is_refused():
    def with_factors(step):
        return replace(step, preconditioner=Preconditioner(torch.ones(2), torch.ones(3)))

    run = rebuilt(ls.record(ls.problem(), lambda p: SGD(p, lr=0.1)), with_factors)
    with pytest.raises(ValueError, match=r"coordinates of its `SGD`.*Pass a number"):
        damping_of(run)


def adaptive(run):
    return rebuilt(run, lambda step: replace(step, optimizer="Adamax"))


def test_a_default_damping_from_steps_that_are_no_gradient_steps_gives_a_warning():
    run = adaptive(ls.record(ls.problem(), lambda p: SGD(p, lr=0.1)))
    with pytest.warns(UserWarning, match="Steps of Adamax are not known to be gradient steps"):
        scores(InfluenceFunction(), run)
    scores(InfluenceFunction(damping=0.7), run)  # does not use the rates
    with pytest.raises(ValueError, match="coordinates of its `Adamax`"):
        damping_of(run)
