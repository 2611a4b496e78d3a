"""Kinds of curvature, against explicit sums of outer products over visits."""

from dataclasses import replace

import least_squares as ls
import pytest
import torch
from torch.optim import SGD

from tda_lightning.attribution.dynamics.curvature import (
    BestAvailable,
    EmpiricalFisher,
    LossWeighted,
    Mixed,
    SampledLabels,
    SampledOrWeighted,
    applied_curvature,
    objective_curvature,
)

STEP = ls.record(ls.problem(), lambda p: SGD(p, lr=0.1))[2]
WITH_TERMS = replace(STEP, terms=torch.tensor([1.0, 3.0, 5.0], dtype=torch.float64))


def matrix(kind, step):
    factor = kind.factor(step)
    return factor.mT @ factor


def fisher(step, scale=(1.0, 1.0, 1.0)):
    return sum(
        s * torch.outer(row, row) / weight
        for s, row, weight in zip(scale, step.sketch, step.weights, strict=True)
    )


def gauss_newton(step):
    inputs = ls.problem().inputs[step.sample_ids]
    return sum(2 * w * torch.outer(x, x) for w, x in zip(step.weights, inputs, strict=True))


def test_the_empirical_fisher_is_a_sum_of_outer_products():
    torch.testing.assert_close(matrix(EmpiricalFisher(), STEP), fisher(STEP))
    torch.testing.assert_close(
        matrix(EmpiricalFisher("independent"), WITH_TERMS), fisher(STEP, (1, 3, 5))
    )


def test_sampled_labels_give_the_gauss_newton_matrix():
    torch.testing.assert_close(matrix(SampledLabels(), STEP), gauss_newton(STEP))


def test_weighting_by_the_loss_gives_the_hessian_of_one_output():
    torch.testing.assert_close(matrix(LossWeighted(), STEP), gauss_newton(STEP))


SEVERAL = {
    "curvature": torch.tensor([0.3, 2.0, 5.0]).double(),
    "trace_ratio": torch.tensor([0.5, 3.0, 7.0]).double(),
}


def trace_matched(step):
    """Return the empirical Fisher, and the same with each visit scaled to its trace."""
    return fisher(step), fisher(step, step.trace_ratio)


def test_weighting_by_a_loss_of_several_outputs_is_a_geometric_mean():
    step = replace(WITH_TERMS, **SEVERAL)
    of_batch, of_visits = trace_matched(step)
    alpha = of_visits.trace() / of_batch.trace()
    scales = (alpha * step.trace_ratio * step.terms).sqrt()
    torch.testing.assert_close(matrix(LossWeighted(), step), fisher(step, scales))


def test_the_unit_of_a_cross_entropy_is_given():
    step = replace(WITH_TERMS, **SEVERAL, loss="cross-entropy")
    scales = (step.trace_ratio * step.terms).sqrt()
    torch.testing.assert_close(matrix(LossWeighted(), step), fisher(STEP, scales))


def test_visits_of_unknown_ratio_are_not_weighted():
    ratios = torch.tensor([0.5, torch.nan, 7.0]).double()
    step = replace(STEP, trace_ratio=ratios, loss="cross-entropy")
    scales = [0.5**0.5, 1.0, 7.0**0.5]
    torch.testing.assert_close(matrix(LossWeighted(), step), fisher(STEP, scales))


def test_weighting_by_the_loss_never_exceeds_the_trace_of_its_hessian():
    step = replace(STEP, **SEVERAL)
    trace = trace_matched(step)[1].trace()
    assert 0.5 * trace < matrix(LossWeighted(), step).trace() <= trace
    alike = replace(step, trace_ratio=torch.full((3,), 3.0).double())
    torch.testing.assert_close(matrix(LossWeighted(), alike), 3 * fisher(step))


def test_the_weighted_curvature_scales_like_the_loss():
    """Outputs in another unit scale a squared error and its Hessian by the same factor."""
    step, square = replace(WITH_TERMS, **SEVERAL), 100.0
    ratios = {name: values / square for name, values in SEVERAL.items()}
    scaled = replace(step, sketch=square * step.sketch, **ratios)
    torch.testing.assert_close(
        matrix(LossWeighted(), scaled), square * matrix(LossWeighted(), step)
    )


def test_mixed_curvature_is_the_mean_of_its_parts():
    mixed = Mixed((SampledLabels(), SampledLabels(), EmpiricalFisher()))
    torch.testing.assert_close(matrix(mixed, STEP), (2 * gauss_newton(STEP) + fisher(STEP)) / 3)


OF_SEVERAL = replace(WITH_TERMS, **SEVERAL)
BARE = replace(OF_SEVERAL, curvature_rows=None)
UNWEIGHTED = replace(BARE, trace_ratio=None)


@pytest.mark.parametrize("kind", [BestAvailable(), SampledOrWeighted()], ids=repr)
def test_without_samples_the_defaults_use_weighted_visits(kind):
    torch.testing.assert_close(matrix(kind, BARE), matrix(LossWeighted(), BARE))
    torch.testing.assert_close(matrix(kind, UNWEIGHTED), fisher(UNWEIGHTED))


def test_with_samples_the_defaults_use_them():
    sampled, weighted = matrix(SampledLabels(), OF_SEVERAL), matrix(LossWeighted(), OF_SEVERAL)
    torch.testing.assert_close(matrix(SampledOrWeighted(), OF_SEVERAL), sampled)
    torch.testing.assert_close(matrix(BestAvailable(), OF_SEVERAL), (sampled + weighted) / 2)


@pytest.mark.parametrize("kind", [BestAvailable(), SampledOrWeighted()], ids=repr)
def test_samples_are_not_used_where_the_gauss_newton_matrix_is_known(kind):
    wrong = replace(STEP, curvature_rows=3 * STEP.curvature_rows)
    torch.testing.assert_close(matrix(kind, wrong), gauss_newton(STEP))
    assert kind.scaled_rows(wrong)[0] is wrong.sketch


FROM_VISITS = [EmpiricalFisher(), EmpiricalFisher("independent"), LossWeighted()]


@pytest.mark.parametrize(
    "kind", [*FROM_VISITS, SampledLabels(), Mixed(), BestAvailable()], ids=repr
)
def test_scaled_rows_are_the_factor(kind):
    rows, scales = kind.scaled_rows(WITH_TERMS)
    torch.testing.assert_close(rows * scales[:, None], kind.factor(WITH_TERMS))


@pytest.mark.parametrize("kind", [*FROM_VISITS, BestAvailable()], ids=repr)
def test_curvature_from_the_visits_rows_does_not_copy_them(kind):
    for step in (BARE, STEP):
        assert kind.scaled_rows(replace(step, curvature_rows=None))[0] is step.sketch


def test_visits_of_weight_zero_have_no_curvature():
    zeros = {"weights": torch.zeros(3).double(), "sketch": torch.zeros(3, ls.D).double()}
    assert matrix(EmpiricalFisher(), replace(STEP, **zeros)).abs().max() == 0


@pytest.mark.parametrize(
    ("kind", "missing"),
    [
        (SampledLabels(), "curvature rows"),
        (Mixed(), "curvature rows"),
        (LossWeighted(), "loss curvatures"),
        (EmpiricalFisher("independent"), "numbers of loss terms"),
    ],
    ids=repr,
)
def test_a_missing_recording_raises_with_its_name(kind, missing):
    bare = replace(STEP, terms=None, trace_ratio=None, curvature_rows=None)
    with pytest.raises(ValueError, match=f"Expected {missing} in every step.*pass `curvature="):
        kind.factor(bare)


def batches_of(sizes, reduction):
    """Return steps that visit each of eleven samples once, in batches of the given sizes."""
    gradients = torch.randn(11, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    steps = []
    for ids in torch.arange(11).split(sizes):
        weights = torch.ones(len(ids), dtype=torch.float64)
        if reduction == "mean":
            weights /= len(ids)
        rows = gradients[ids] * weights[:, None]
        facts = {
            "sample_ids": ids,
            "weights": weights,
            "sketch": rows,
            "curvature": None,
            "trace_ratio": None,
            "terms": None,
        }
        steps.append(replace(STEP, **facts))
    return steps


def test_all_visits_count_alike_in_the_objective_whatever_the_batch_sizes():
    whole, kind = (
        objective_curvature(batches_of([11], "mean"), EmpiricalFisher()),
        EmpiricalFisher(),
    )
    torch.testing.assert_close(objective_curvature(batches_of([5, 5, 1], "mean"), kind), whole)
    torch.testing.assert_close(
        objective_curvature(batches_of([3, 7, 1], "sum"), kind) * 3, whole * 11
    )


def test_steps_of_weight_zero_have_no_curvature():
    weightless = replace(STEP, weights=torch.zeros_like(STEP.weights))
    assert not objective_curvature([weightless], SampledLabels()).any()


def test_applied_curvature_is_the_mean_over_steps_whatever_their_weights():
    steps = [replace(STEP, weights=STEP.weights * c, sketch=STEP.sketch * c) for c in (0.01, 1.0)]
    expected = sum(fisher(step) for step in steps) / 2
    torch.testing.assert_close(applied_curvature(steps, EmpiricalFisher()), expected)
    # In the objective, the clipped step counts as much as the other.
    objective = objective_curvature(steps, EmpiricalFisher())
    torch.testing.assert_close(objective, fisher(STEP) * (0.01 + 1) / 2)
