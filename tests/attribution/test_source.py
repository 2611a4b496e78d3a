"""SOURCE against matrix exponentials, against unrolling, and against retraining."""

import math
from dataclasses import replace
from itertools import pairwise

import least_squares as ls
import pytest
import torch
from torch.optim import SGD

from tda_lightning import Source, Unrolled
from tda_lightning.attribution import BestAvailable, Exponential, Linear, SampledLabels
from tda_lightning.stores import MemoryStore

STEPS = 12


def run_of(optimizer=lambda p: SGD(p, lr=0.1), stride=1, **settings):
    return ls.record(ls.problem(steps=STEPS, **settings), optimizer, stride=stride)


def scores(method, run, q=None):
    return method.attribute(run, ls.queries() if q is None else q, progress=False).values


@pytest.mark.parametrize("propagator", [Exponential(), Linear(), Linear(2.0)], ids=repr)
@pytest.mark.parametrize("decay", [0.0, 0.4], ids=["no decay", "decay"])
def test_with_a_segment_per_step_it_is_unrolled(propagator, decay):
    run = run_of(lambda p: SGD(p, lr=0.1, weight_decay=decay))
    found = scores(Source(STEPS, BestAvailable(), propagator), run)
    torch.testing.assert_close(found, scores(Unrolled(BestAvailable(), propagator), run))


@pytest.mark.parametrize("segments", [1, 2, 5])
@pytest.mark.parametrize(("stride", "momentum"), [(1, 0.0), (3, 0.0), (1, 0.8)])
def test_it_is_its_equation_with_dense_matrices(segments, stride, momentum):
    run = run_of(lambda p: SGD(p, lr=0.02, momentum=momentum), stride)
    expected = torch.zeros(ls.N_QUERY, ls.N_TRAIN, dtype=torch.float64)
    cuts = [STEPS * i // segments for i in range(segments + 1)]
    remaining = ls.queries()
    for a, b in reversed(list(pairwise(cuts))):
        steps, count = [run[t] for t in range(a, b)], (b - a) * stride
        rate = sum(step.lr for step in steps) / (1 - momentum) / (b - a)
        hessian = sum(s.curvature_rows.mT @ s.curvature_rows for s in steps) / (b - a)
        powers = [torch.matrix_exp(-rate * j * hessian) for j in range(count + 1)]
        direction = remaining @ (rate * sum(powers[:count]) / (b - a))
        for step in steps:
            expected.index_add_(1, step.sample_ids, direction @ step.sketch.mT)
        remaining = remaining @ powers[count]
    torch.testing.assert_close(scores(Source(segments, SampledLabels()), run), expected)


def test_with_one_batch_and_one_rate_it_is_what_retraining_does():
    """Nothing is lost by averaging over a training whose gradients hardly change."""

    def optimizer(p):
        return SGD(p, lr=1e-4)

    problem = ls.everything(ls.problem(steps=20))
    expected = ls.effect_of_presence(problem, optimizer, ls.queries())
    found = scores(Source(2, SampledLabels(), Linear()), ls.record(problem, optimizer))
    torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-6)


def test_curvature_far_below_rounding_does_not_make_a_series_vanish():
    run = MemoryStore()
    plain = run_of()
    run.begin(replace(plain.recipe, dtype="float32"))
    for step in plain:
        tiny = (1e-6 * step.curvature_rows).float()
        single = {"weights": step.weights.float(), "sketch": step.sketch.float()}
        run.append(replace(step, curvature_rows=tiny, curvature=None, **single))
    values = scores(Source(1, SampledLabels()), run, ls.queries().float())
    rate = sum(step.lr for step in run) / STEPS
    expected = torch.zeros(ls.N_QUERY, ls.N_TRAIN)
    for step in run:
        expected.index_add_(1, step.sample_ids, rate * ls.queries().float() @ step.sketch.mT)
    torch.testing.assert_close(values, expected)


def test_overshoot_does_not_make_it_explode():
    wild = run_of(lambda p: SGD(p, lr=0.1), scale=20.0)
    assert math.isfinite(scores(Source(), wild).abs().max())


def test_it_is_linear_in_the_query_and_blind_to_samples_never_drawn():
    run, one, other = run_of(), ls.queries(1), ls.queries(2)
    torch.testing.assert_close(
        scores(Source(), run, 2 * one - other),
        2 * scores(Source(), run, one) - scores(Source(), run, other),
    )
    assert scores(Source(), run)[:, ls.N_TRAIN - 1].abs().max() == 0


def test_more_segments_than_steps_are_refused():
    message = rf"`segments` is {STEPS + 1}; expected a number from 1 to {STEPS}"
    with pytest.raises(ValueError, match=message):
        scores(Source(STEPS + 1), run_of())


@pytest.mark.parametrize("steps", [1, 2, 3, 4])
def test_by_default_there_are_three_segments_or_as_many_as_steps(steps):
    run = run_of()[:steps]
    torch.testing.assert_close(scores(Source(), run), scores(Source(min(3, steps)), run))


@pytest.mark.parametrize("segments", [0, -1, True])
def test_segments_that_are_no_number_of_segments_are_refused(segments):
    with pytest.raises(ValueError, match=r"`segments` is .*; expected a whole number of 1 or more"):
        Source(segments)


def test_steps_that_were_clipped_bend_as_much_less():
    run, clipped = run_of(), MemoryStore()
    clipped.begin(run.recipe)
    for number, step in enumerate(run):  # every second one, to a hundredth
        c = 0.01 if number % 2 else 1.0
        clipped.append(
            replace(
                step,
                weights=c * step.weights,
                sketch=c * step.sketch,
                curvature_rows=c**0.5 * step.curvature_rows,
            )
        )
    one, mean = Source(1, SampledLabels(), Linear()), torch.zeros(ls.D, ls.D, dtype=torch.float64)
    for step in clipped:
        mean += step.curvature_rows.mT @ step.curvature_rows / STEPS
    rate = sum(step.lr for step in clipped) / STEPS
    left = torch.eye(ls.D, dtype=torch.float64) - rate * mean
    series = sum(torch.linalg.matrix_power(left, j) for j in range(STEPS)) / STEPS
    directions = rate * ls.queries() @ series
    for step, direction in one.directions(clipped, ls.queries()):
        torch.testing.assert_close(direction, directions, msg=f"step {step.index}")
