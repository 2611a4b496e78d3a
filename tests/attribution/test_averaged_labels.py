"""Steps with averaged rows of sampled labels, against explicit means of their curvatures."""

from dataclasses import replace

import least_squares as ls
import pytest
import torch
from torch.optim import SGD

from tda_lightning.attribution.steps import steps_backward
from tda_lightning.stores import MemoryStore
from tda_lightning.stores.step import FIRST_LABELLED_STEPS

STEP = ls.record(ls.problem(), lambda p: SGD(p, lr=0.1))[2]
K = STEP.sketch.shape[1]
# Steps with labels after the first, and their numbers of rows: 256 are reached with three of them.
DRAWN = {23: 101, 24: 103, 29: 97, 31: 89, 37: 2, 41: 300, 43: 5}
N_STEPS = 47


def run_with(rows_of):
    store = MemoryStore()
    store.begin(ls.record(ls.problem(), lambda p: SGD(p, lr=0.1)).recipe)
    for number in range(N_STEPS):
        store.append(replace(STEP, index=number, curvature_rows=rows_of(number)))
    return store


def rows(number, count):
    generator = torch.Generator().manual_seed(number)
    return torch.randn(count, K, generator=generator, dtype=torch.float64)


def labels_at_a_share(number):
    return rows(number, 3 if number < FIRST_LABELLED_STEPS else DRAWN.get(number, 0))


def outer_products(rows):
    return rows.mT @ rows


def test_a_step_has_the_mean_curvature_of_the_next_steps_with_labels():
    steps = {step.index: step for step in steps_backward(run_with(labels_at_a_share))}
    assert list(steps) == list(reversed(range(N_STEPS)))
    expected = {23: [23, 24, 29], 24: [24, 29, 31], 29: [29, 31, 37, 41], 31: [31, 37, 41]}
    expected |= {37: [37, 41], 41: [41], 43: [43]}
    for number, window in expected.items():
        curvatures = [outer_products(rows(n, DRAWN[n])) for n in window]
        mean = torch.stack(curvatures).mean(dim=0)
        torch.testing.assert_close(outer_products(steps[number].curvature_rows), mean)


def test_first_steps_and_steps_without_labels_stay_as_they_are():
    run = run_with(labels_at_a_share)
    for step in steps_backward(run):
        assert torch.equal(step.sketch, run[step.index].sketch)
        if step.index not in DRAWN:
            assert torch.equal(step.curvature_rows, run[step.index].curvature_rows)


@pytest.mark.parametrize("count", [None, 7])
def test_runs_without_labels_and_with_all_of_them_stay_as_they_are(count):
    run = run_with(lambda number: None if count is None else rows(number, count))
    for step in steps_backward(run):
        given = run[step.index].curvature_rows
        assert step.curvature_rows is given is None or torch.equal(step.curvature_rows, given)
