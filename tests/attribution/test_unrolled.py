"""Unrolled, against retraining with a sample's weight perturbed."""

from dataclasses import dataclass, replace

import least_squares as ls
import pytest
import torch
from torch.optim import SGD

from tda_lightning import TracIn, Unrolled
from tda_lightning.attribution.dynamics.curvature import (
    Curvature,
    EmpiricalFisher,
    LossWeighted,
    Mixed,
    SampledLabels,
)
from tda_lightning.attribution.dynamics.optimizer import Dynamics
from tda_lightning.attribution.dynamics.propagator import Exponential, LimitedCurvature, Linear
from tda_lightning.stores import MemoryStore
from tda_lightning.stores.step import ParameterGroup

# Above 1, since momentum is stable at rates that overshoot without it.
EXACT = Unrolled(SampledLabels(), Linear(4.0))


@dataclass(frozen=True)
class Flat(Curvature):
    """A curvature of zero."""

    def factor(self, step):
        return step.sketch[:0]


class SGDW(SGD):
    """SGD with decoupled weight decay."""

    def __init__(self, params, lr, momentum, decay):
        super().__init__(params, lr=lr, momentum=momentum)
        self.param_groups[0]["decay"] = decay

    def step(self):
        group = self.param_groups[0]
        shrink = 1 - group["lr"] * group["decay"]
        for weights in group["params"]:
            weights.data *= shrink
        super().step()


FROZEN = torch.tensor([0.5, 2.0, 1.0, 0.1, 3.0], dtype=torch.float64)


class FrozenAdamW(torch.optim.Optimizer):
    """AdamW with a constant second moment, and without bias correction of the first."""

    def __init__(self, params, decay):
        settings = {"lr": 0.05, "betas": (0.8, 0.999), "eps": 1e-8, "weight_decay": decay}
        super().__init__(params, settings)
        self.moment = 0.0

    def step(self):
        group = self.param_groups[0]
        (weights,) = group["params"]
        self.moment = 0.8 * self.moment + 0.2 * weights.grad
        weights.data *= 1 - group["lr"] * group["weight_decay"]
        weights.data -= group["lr"] * FROZEN * self.moment


OPTIMIZERS = {
    "sgd": lambda p: SGD(p, lr=0.05),
    "momentum": lambda p: SGD(p, lr=0.05, momentum=0.9),
    "nesterov": lambda p: SGD(p, lr=0.05, momentum=0.8, nesterov=True),
    "dampening": lambda p: SGD(p, lr=0.1, momentum=0.7, dampening=0.4),
    "coupled decay": lambda p: SGD(p, lr=0.05, weight_decay=0.3),
    "coupled decay and momentum": lambda p: SGD(p, lr=0.05, momentum=0.9, weight_decay=0.3),
    "coupled decay and nesterov": lambda p: SGD(
        p, lr=0.05, momentum=0.9, weight_decay=0.3, nesterov=True
    ),
}
each_optimizer = pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)


def scores(method, run, q=None):
    return method.attribute(run, ls.queries() if q is None else q, progress=False).values


@each_optimizer
def test_scores_match_retraining_with_another_sample_weight(optimizer):
    problem = ls.problem(scale=0.7)
    expected = ls.effect_of_presence(problem, optimizer, ls.queries())
    torch.testing.assert_close(
        scores(EXACT, ls.record(problem, optimizer)), expected, rtol=1e-6, atol=1e-9
    )


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_scores_match_retraining_with_decoupled_decay(momentum):
    def optimizer(p):
        return SGDW(p, lr=0.05, momentum=momentum, decay=0.5)

    problem = ls.problem(scale=0.7)
    run = MemoryStore()
    plain = ls.record(problem, optimizer)
    run.begin(plain.recipe)
    for step in plain:
        run.append(replace(step, groups=(replace(step.groups[0], weight_decay=0.5),)))
    expected = ls.effect_of_presence(problem, optimizer, ls.queries())
    torch.testing.assert_close(scores(EXACT, run), expected, rtol=1e-6, atol=1e-9)


def test_the_order_of_rows_within_a_step_does_not_matter():
    """Accumulated batches put a step's rows in another order."""
    problem = ls.problem(batch_size=5)
    run, reordered = ls.record(problem, OPTIMIZERS["momentum"]), MemoryStore()
    reordered.begin(run.recipe)
    for step in run:
        order = torch.tensor([3, 1, 0, 4, 2])
        reordered.append(
            replace(
                step,
                sample_ids=step.sample_ids[order],
                sketch=step.sketch[order],
                weights=step.weights[order],
                curvature_rows=step.curvature_rows[order],
            )
        )
    torch.testing.assert_close(scores(EXACT, reordered), scores(EXACT, run))


def test_without_curvature_it_equals_tracin():
    run = ls.record(ls.problem(), OPTIMIZERS["sgd"])
    torch.testing.assert_close(scores(Unrolled(Flat()), run), scores(TracIn(), run))


@pytest.mark.parametrize("name", sorted(set(OPTIMIZERS) - {"dampening"}))
def test_with_a_stride_a_step_represents_as_many_equal_ones(name):
    """Dampening is excluded: only the first step of all is undampened."""
    sparse, dense = ls.record(ls.problem(), OPTIMIZERS[name], stride=3), MemoryStore()
    dense.begin(replace(sparse.recipe, every_n_steps=1))
    for step in sparse:
        for _ in range(3):
            dense.append(step)
    torch.testing.assert_close(scores(EXACT, sparse), scores(EXACT, dense))


@pytest.mark.parametrize("decay", [0.0, 0.5])
def test_in_the_coordinates_of_adam_scores_match_retraining_with_adam(decay):
    """This is exact if the second moment is constant."""
    root = FROZEN.sqrt()

    def optimizer(p):
        return FrozenAdamW(p, decay)

    problem = ls.problem(scale=0.7)
    raw, run = ls.record(problem, optimizer), MemoryStore()
    run.begin(replace(raw.recipe, preconditioner="optimizer"))
    for step in raw:
        rows = {"sketch": step.sketch * root, "curvature_rows": step.curvature_rows * root}
        run.append(replace(step, optimizer="AdamW", **rows))
    expected = ls.effect_of_presence(problem, optimizer, ls.queries())
    values = scores(EXACT, run, ls.queries() * root)
    torch.testing.assert_close(values, expected, rtol=1e-6, atol=1e-9)


def test_coupled_decay_of_adaptive_optimizers_is_ignored():
    raw, run = ls.record(ls.problem(), OPTIMIZERS["sgd"]), MemoryStore()
    run.begin(replace(raw.recipe, preconditioner="optimizer"))
    for step in raw:
        group = replace(step.groups[0], eps=1e-8, weight_decay=0.3)
        run.append(replace(step, optimizer="RMSprop", groups=(group,)))
    torch.testing.assert_close(scores(EXACT, run), scores(EXACT, raw))


def largest_direction(propagator, momentum, nesterov=0.0, batch_size=3):
    """Return the largest norm of a direction, over 300 steps that overshoot at least tenfold.

    They overshoot along ``batch_size`` of five axes. The unit is the norm without curvature.
    """
    overshooting = ls.problem(steps=300, scale=20.0, batch_size=batch_size)
    still = ls.record(replace(overshooting, rates=[1.0] * 300), lambda p: SGD(p, lr=1e-9))
    run = MemoryStore()
    run.begin(still.recipe)
    group = ParameterGroup(lr=0.05, momentum=momentum, nesterov=nesterov)
    for step in still:
        run.append(replace(step, groups=(group,)))
    method = Unrolled(SampledLabels(), propagator)
    unit = Dynamics.of(run[1]).effective_lr * float(ls.queries().norm())
    return max(float(d.norm()) for _, d in method.directions(run, ls.queries())) / unit


@pytest.mark.parametrize("propagator", [Linear(), Exponential()], ids=repr)
@pytest.mark.parametrize("nesterov", [0.0, 1.0], ids=["heavy ball", "nesterov"])
@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_directions_stay_bounded_if_steps_overshoot(propagator, nesterov, momentum, batch_size):
    limit = 1 if momentum == 0 else 5
    assert largest_direction(propagator, momentum, nesterov, batch_size) <= limit


def largest_amplification(propagator, dampening):
    """Return how far random steps that overshoot thirtyfold amplify a direction, at momentum 0.9.

    Each of 500 steps has a curvature of 16 random directions out of 512.
    """
    generator = torch.Generator().manual_seed(3)
    still = ls.record(ls.problem(steps=500), lambda p: SGD(p, lr=1e-9))
    run = MemoryStore()
    run.begin(replace(still.recipe, dimension=512))
    group = ParameterGroup(lr=0.1 / (1 - dampening), momentum=0.9, dampening=dampening)
    for step in still:
        rows = torch.randn(16, 512, generator=generator, dtype=torch.float64)
        rows *= 30**0.5 / rows.norm(dim=1, keepdim=True)
        empty = torch.zeros(len(step.sample_ids), 512, dtype=torch.float64)
        run.append(replace(step, groups=(group,), sketch=empty, curvature_rows=rows))
    query = torch.randn(1, 512, generator=generator, dtype=torch.float64)
    directions = Unrolled(SampledLabels(), propagator).directions(run, query)
    return max(float(direction.norm()) for _, direction in directions) / float(query.norm())


@pytest.mark.slow
@pytest.mark.parametrize("dampening", [0.0, 0.9], ids=["heavy ball", "average"])
def test_random_steps_with_momentum_do_not_resonate(dampening):
    assert largest_amplification(Exponential(), dampening) <= 1
    assert largest_amplification(Linear((1 - 0.9) ** -0.5), dampening) > 100


@pytest.mark.parametrize("propagator", [Linear(), Linear(2.0), Exponential()], ids=repr)
@pytest.mark.parametrize("rate", [0.0, 1e-3, 0.1, 10.0])
@pytest.mark.parametrize("m", [0, 3, 7])
def test_limited_curvature_applies_the_propagator_to_every_eigenvalue(propagator, rate, m):
    generator = torch.Generator().manual_seed(5)
    rows = torch.randn(m, 5, generator=generator, dtype=torch.float64)
    scales = torch.rand(m, generator=generator, dtype=torch.float64)
    eigenvalues, vectors = torch.linalg.eigh((rows.mT * scales**2) @ rows)
    limited = propagator.taken(rate * eigenvalues) / rate if rate else eigenvalues
    expected = ls.queries() - ls.queries() @ (vectors * limited) @ vectors.mT
    displacements = ls.queries().mT.clone()
    curvature = LimitedCurvature(rows, scales, rate, propagator)
    curvature.subtract_product_(displacements, rows @ ls.queries().mT)
    torch.testing.assert_close(displacements.mT, expected)


@each_optimizer
@pytest.mark.parametrize("stride", [1, 3])
@pytest.mark.parametrize(
    "curvature", [EmpiricalFisher(), LossWeighted(), SampledLabels(), Mixed()], ids=repr
)
def test_visit_scores_are_products_of_rows_and_directions(optimizer, stride, curvature):
    run, method = ls.record(ls.problem(), optimizer, stride), Unrolled(curvature)
    visit_scores = method.visit_scores(run, ls.queries())
    directions = method.directions(run, ls.queries())
    for (step, values), (same, direction) in zip(visit_scores, directions, strict=True):
        assert step is same
        torch.testing.assert_close(values, step.sketch @ direction.mT)


@each_optimizer
def test_queries_and_yielded_directions_do_not_change_later(optimizer):
    run, queries = ls.record(ls.problem(), optimizer), ls.queries()
    pairs = [(d, d.clone()) for _, d in Unrolled().directions(run, queries)]
    assert all(torch.equal(direction, then) for direction, then in pairs)
    assert torch.equal(queries, ls.queries())


def test_loss_weighted_curvature_is_exact_for_a_single_output():
    run = ls.record(ls.problem(), OPTIMIZERS["momentum"])
    torch.testing.assert_close(
        scores(replace(EXACT, curvature=LossWeighted()), run), scores(EXACT, run)
    )


def test_scores_are_linear_in_the_query():
    run = ls.record(ls.problem(), OPTIMIZERS["nesterov"])
    q1, q2 = ls.queries(1), ls.queries(2)
    torch.testing.assert_close(
        scores(Unrolled(), run, 2 * q1 - 3 * q2),
        2 * scores(Unrolled(), run, q1) - 3 * scores(Unrolled(), run, q2),
    )


def test_a_slice_of_a_run_counts_as_a_training_that_ended_there():
    problem = ls.problem(scale=0.7)
    short = replace(problem, batches=problem.batches[:4], rates=problem.rates[:4])
    run = ls.record(problem, OPTIMIZERS["momentum"])
    expected = ls.effect_of_presence(short, OPTIMIZERS["momentum"], ls.queries())
    torch.testing.assert_close(scores(EXACT, run[:4]), expected, rtol=1e-6, atol=1e-9)


def test_samples_that_are_never_drawn_score_zero():
    values = scores(Unrolled(), ls.record(ls.problem(), OPTIMIZERS["momentum"]))
    assert values[:, ls.N_TRAIN - 1].abs().max() == 0
    assert (values != 0).any()


def test_permuting_training_samples_permutes_scores():
    run, renamed = ls.record(ls.problem(), OPTIMIZERS["momentum"]), MemoryStore()
    permutation = torch.randperm(ls.N_TRAIN, generator=torch.Generator().manual_seed(2))
    renamed.begin(run.recipe)
    for step in run:
        renamed.append(replace(step, sample_ids=permutation[step.sample_ids]))
    torch.testing.assert_close(scores(Unrolled(), renamed)[:, permutation], scores(Unrolled(), run))


@pytest.mark.parametrize("steps", [1, 29], ids=["fewer samples than columns", "more samples"])
def test_self_influence_is_the_score_for_the_gradient_of_the_last_visit(steps):
    problem = ls.problem(steps=steps, scale=0.7)
    raw = ls.record(problem, OPTIMIZERS["momentum"])
    run = MemoryStore()
    run.begin(replace(raw.recipe, train_ids=None))
    for step in raw:
        run.append(step)
    last = {}
    for step in run:
        for sample, row, weight in zip(
            step.sample_ids.tolist(), step.sketch, step.weights, strict=True
        ):
            last[sample] = row / weight
    own = torch.stack([last[sample] for sample in run.train_ids().tolist()])
    expected = EXACT.attribute(run, own, progress=False).values.diagonal()
    result = EXACT.self_influence(run, progress=False)
    torch.testing.assert_close(result.values, expected)
    assert (len(result) > own.shape[1]) == (steps == 29)
