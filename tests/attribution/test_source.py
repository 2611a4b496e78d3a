"""SOURCE against matrix exponentials, against unrolling, and against retraining."""

import math
from dataclasses import replace
from itertools import pairwise

import least_squares as ls
import pytest
import torch
from lightning_models import Plain, loader, quiet_trainer
from torch import nn
from torch.optim import SGD
from torch.utils.data import TensorDataset

from tda_lightning import GradientRecorder, Source, Unrolled, attribute
from tda_lightning.attribution import BestAvailable, Exponential, Linear, SampledLabels
from tda_lightning.stores import MemoryStore

STEPS = 12


def run_of(optimizer=lambda p: SGD(p, lr=0.1), stride=1, **settings):
    return ls.record(ls.problem(steps=STEPS, **settings), optimizer, stride=stride)


def scores(method, run, q=None):
    return method.attribute(run, ls.queries() if q is None else q, progress=False).values


@pytest.mark.parametrize("propagator", [Exponential(), Linear(), Linear(2.0)], ids=repr)
@pytest.mark.parametrize("decay", [0.0, 0.4], ids=["no decay", "decay"])
def test_with_one_segment_per_step_it_equals_unrolled(propagator, decay):
    run = run_of(lambda p: SGD(p, lr=0.1, weight_decay=decay))
    values = scores(Source(STEPS, BestAvailable(), propagator), run)
    torch.testing.assert_close(values, scores(Unrolled(BestAvailable(), propagator), run))


@pytest.mark.parametrize("segments", [1, 2, 5])
@pytest.mark.parametrize(("stride", "momentum"), [(1, 0.0), (3, 0.0), (1, 0.8)])
def test_it_matches_its_equation_with_dense_matrices(segments, stride, momentum):
    run = run_of(lambda p: SGD(p, lr=0.02, momentum=momentum), stride)
    expected = torch.zeros(ls.N_QUERY, ls.N_TRAIN, dtype=torch.float64)
    cuts = [STEPS * i // segments for i in range(segments + 1)]
    propagated = ls.queries()
    for a, b in reversed(list(pairwise(cuts))):
        steps, K = [run[t] for t in range(a, b)], (b - a) * stride
        eta = sum(step.lr for step in steps) / (1 - momentum) / (b - a)
        hessian = sum(s.curvature_rows.mT @ s.curvature_rows for s in steps) / (b - a)
        powers = [torch.matrix_exp(-eta * j * hessian) for j in range(K + 1)]
        direction = propagated @ (eta * sum(powers[:K]) / (b - a))
        for step in steps:
            expected.index_add_(1, step.sample_ids, direction @ step.sketch.mT)
        propagated = propagated @ powers[K]
    torch.testing.assert_close(scores(Source(segments, SampledLabels()), run), expected)


def test_with_one_batch_and_one_rate_it_matches_retraining():
    """Averaging is exact if the gradients hardly change during the training."""

    def optimizer(p):
        return SGD(p, lr=1e-4)

    problem = ls.full_batches(ls.problem(steps=20))
    expected = ls.effect_of_presence(problem, optimizer, ls.queries())
    values = scores(Source(2, SampledLabels(), Linear()), ls.record(problem, optimizer))
    torch.testing.assert_close(values, expected, rtol=1e-2, atol=1e-6)


def test_the_series_is_accurate_for_curvature_below_rounding():
    run = MemoryStore()
    plain = run_of()
    run.begin(replace(plain.recipe, dtype="float32"))
    for step in plain:
        tiny = (1e-6 * step.curvature_rows).float()
        single = {"weights": step.weights.float(), "sketch": step.sketch.float()}
        run.append(replace(step, curvature_rows=tiny, curvature=None, trace_ratio=None, **single))
    values = scores(Source(1, SampledLabels()), run, ls.queries().float())
    rate = sum(step.lr for step in run) / STEPS
    expected = torch.zeros(ls.N_QUERY, ls.N_TRAIN)
    for step in run:
        expected.index_add_(1, step.sample_ids, rate * ls.queries().float() @ step.sketch.mT)
    torch.testing.assert_close(values, expected)


def test_steps_that_overshoot_give_finite_scores():
    overshooting = run_of(lambda p: SGD(p, lr=0.1), scale=20.0)
    assert math.isfinite(scores(Source(), overshooting).abs().max())


def test_scores_are_linear_in_the_query_and_zero_for_samples_never_drawn():
    run, q1, q2 = run_of(), ls.queries(1), ls.queries(2)
    torch.testing.assert_close(
        scores(Source(), run, 2 * q1 - q2),
        2 * scores(Source(), run, q1) - scores(Source(), run, q2),
    )
    assert scores(Source(), run)[:, ls.N_TRAIN - 1].abs().max() == 0


def test_more_segments_than_steps_are_refused():
    message = rf"`segments` is {STEPS + 1}; expected a number from 1 to {STEPS}"
    with pytest.raises(ValueError, match=message):
        scores(Source(STEPS + 1), run_of())


@pytest.mark.parametrize("steps", [1, 2, 3, 4])
def test_the_default_is_three_segments_or_one_per_step(steps):
    run = run_of()[:steps]
    torch.testing.assert_close(scores(Source(), run), scores(Source(min(3, steps)), run))


@pytest.mark.parametrize("segments", [0, -1, True])
def test_wrong_numbers_of_segments_are_refused(segments):
    with pytest.raises(ValueError, match=r"`segments` is .*; expected a whole number of 1 or more"):
        Source(segments)


def test_clipped_steps_have_less_curvature():
    run, clipped = run_of(), MemoryStore()
    clipped.begin(run.recipe)
    for number, step in enumerate(run):  # clip every second step to a hundredth
        c = 0.01 if number % 2 else 1.0
        clipped.append(
            replace(
                step,
                weights=c * step.weights,
                sketch=c * step.sketch,
                curvature_rows=c**0.5 * step.curvature_rows,
            )
        )
    mean_hessian = torch.zeros(ls.D, ls.D, dtype=torch.float64)
    for step in clipped:
        mean_hessian += step.curvature_rows.mT @ step.curvature_rows / STEPS
    eta = sum(step.lr for step in clipped) / STEPS
    phi = torch.eye(ls.D, dtype=torch.float64) - eta * mean_hessian
    series = sum(torch.linalg.matrix_power(phi, j) for j in range(STEPS)) / STEPS
    directions = eta * ls.queries() @ series
    for step, direction in Source(1, SampledLabels(), Linear()).directions(clipped, ls.queries()):
        torch.testing.assert_close(direction, directions, msg=f"step {step.index}")


@pytest.mark.slow
def test_dead_inputs_do_not_break_the_eigenvectors():
    """Digits have pixels that are always zero; LAPACK failed for this run in single precision."""
    x, y = pytest.importorskip("sklearn.datasets").load_digits(return_X_y=True)
    data = TensorDataset(torch.tensor(x[:1000] / 16, dtype=torch.float32), torch.tensor(y[:1000]))
    torch.manual_seed(2)
    net = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    model = Plain(net, optimizer=lambda p: SGD(p, lr=0.1, momentum=0.9))
    run = MemoryStore()
    quiet_trainer(GradientRecorder(run), max_epochs=10).fit(model, loader(data, batch_size=50))
    values = attribute(run, model, data[:3], method=Source(), progress=False).values
    assert values.isfinite().all()
