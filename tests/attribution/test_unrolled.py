"""Unrolled against retraining: perturb a sample's weight, take the same steps again."""

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
from tda_lightning.attribution.dynamics.propagator import Exponential, Linear, TamedCurvature
from tda_lightning.stores import MemoryStore
from tda_lightning.stores.step import ParameterGroup

EXACT = Unrolled(SampledLabels(), Linear())


@dataclass(frozen=True)
class Flat(Curvature):
    """No curvature at all."""

    def factor(self, step):
        return step.sketch[:0]


class SGDW(SGD):
    """SGD whose weight decay is decoupled from its learning."""

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
    """AdamW with a second moment that stands still, and no correction of the first's bias."""

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
def test_it_is_what_retraining_with_another_weight_does(optimizer):
    problem = ls.problem(scale=0.7)
    expected = ls.effect_of_presence(problem, optimizer, ls.queries())
    torch.testing.assert_close(
        scores(EXACT, ls.record(problem, optimizer)), expected, rtol=1e-6, atol=1e-9
    )


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_it_is_what_retraining_does_with_decoupled_decay(momentum):
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


def test_it_is_what_retraining_does_when_accumulated_batches_differ_in_size():
    """A step's rows may come from several batches, each with weights of its own."""
    problem = ls.problem(batch_size=5)
    run, halves = ls.record(problem, OPTIMIZERS["momentum"]), MemoryStore()
    halves.begin(run.recipe)
    for step in run:
        order = torch.tensor([3, 1, 0, 4, 2])
        halves.append(
            replace(
                step,
                sample_ids=step.sample_ids[order],
                sketch=step.sketch[order],
                weights=step.weights[order],
                curvature_rows=step.curvature_rows[order],
            )
        )
    torch.testing.assert_close(scores(EXACT, halves), scores(EXACT, run))


def test_without_curvature_it_is_tracin():
    run = ls.record(ls.problem(), OPTIMIZERS["sgd"])
    torch.testing.assert_close(scores(Unrolled(Flat()), run), scores(TracIn(), run))


@pytest.mark.parametrize("name", sorted(set(OPTIMIZERS) - {"dampening"}))
def test_with_a_stride_a_step_stands_for_as_many_equal_ones(name):
    """With dampening not quite: only the first of all steps is undampened."""
    sparse, dense = ls.record(ls.problem(), OPTIMIZERS[name], stride=3), MemoryStore()
    dense.begin(replace(sparse.recipe, every_n_steps=1))
    for step in sparse:
        for _ in range(3):
            dense.append(step)
    torch.testing.assert_close(scores(EXACT, sparse), scores(EXACT, dense))


@pytest.mark.parametrize("decay", [0.0, 0.5])
def test_in_the_coordinates_of_adam_it_is_what_retraining_with_adam_does(decay):
    """Exactly so if the second moment stands still."""
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
    found = scores(EXACT, run, ls.queries() * root)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)


def test_coupled_decay_divided_by_a_second_moment_is_taken_for_none():
    raw, run = ls.record(ls.problem(), OPTIMIZERS["sgd"]), MemoryStore()
    run.begin(replace(raw.recipe, preconditioner="optimizer"))
    for step in raw:
        group = replace(step.groups[0], eps=1e-8, weight_decay=0.3)
        run.append(replace(step, optimizer="RMSprop", groups=(group,)))
    torch.testing.assert_close(scores(EXACT, run), scores(EXACT, raw))


def furthest(propagator, momentum, nesterov=0.0, batch_size=3):
    """Return how far the query reaches at most, over 300 steps that overshoot tenfold and more.

    They do so along one or three of five axes. What plain descent would reach is 1.
    """
    wild = ls.problem(steps=300, scale=20.0, batch_size=batch_size)
    still = ls.record(replace(wild, rates=[1.0] * 300), lambda p: SGD(p, lr=1e-9))
    run = MemoryStore()
    run.begin(still.recipe)
    group = ParameterGroup(lr=0.05, momentum=momentum, nesterov=nesterov)
    for step in still:
        run.append(replace(step, groups=(group,)))
    method = Unrolled(SampledLabels(), propagator)
    effective_lr = Dynamics.of(run[1]).effective_lr * float(ls.queries().norm())
    return max(float(d.norm()) for _, d in method.directions(run, ls.queries())) / effective_lr


@pytest.mark.parametrize("propagator", [Linear(), Exponential()], ids=repr)
@pytest.mark.parametrize("nesterov", [0.0, 1.0], ids=["heavy ball", "nesterov"])
@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_steps_that_overshoot_do_not_make_it_explode(propagator, nesterov, momentum, batch_size):
    limit = 1 if momentum == 0 else 5
    assert furthest(propagator, momentum, nesterov, batch_size) <= limit


def test_with_momentum_a_limit_of_one_would_not_be_enough():
    assert furthest(Linear(1 / (1 - 0.9) ** 0.5), momentum=0.9) > 1e4


@pytest.mark.parametrize("propagator", [Linear(), Linear(2.0), Exponential()], ids=repr)
@pytest.mark.parametrize("rate", [0.0, 1e-3, 0.1, 10.0])
@pytest.mark.parametrize("m", [0, 3, 7])
def test_a_tamed_curvature_is_its_rule_applied_to_every_eigenvalue(propagator, rate, m):
    generator = torch.Generator().manual_seed(5)
    rows = torch.randn(m, 5, generator=generator, dtype=torch.float64)
    scales = torch.rand(m, generator=generator, dtype=torch.float64)
    eigenvalues, vectors = torch.linalg.eigh((rows.mT * scales**2) @ rows)
    taken = propagator.taken(rate * eigenvalues) / rate if rate else eigenvalues
    tamed, left = TamedCurvature(rows, scales, rate, propagator), ls.queries().mT.clone()
    tamed.pull_(left, rows @ ls.queries().mT)
    expected = ls.queries() - ls.queries() @ (vectors * taken) @ vectors.mT
    torch.testing.assert_close(left.mT, expected)


@each_optimizer
@pytest.mark.parametrize("stride", [1, 3])
@pytest.mark.parametrize(
    "curvature", [EmpiricalFisher(), LossWeighted(), SampledLabels(), Mixed()], ids=repr
)
def test_a_visit_scores_what_its_row_has_in_the_direction(optimizer, stride, curvature):
    run, method = ls.record(ls.problem(), optimizer, stride), Unrolled(curvature)
    followed = method.directions(run, ls.queries())
    for (step, found), (same, direction) in zip(
        method.visit_scores(run, ls.queries()), followed, strict=True
    ):
        assert step is same
        torch.testing.assert_close(found, step.sketch @ direction.mT)


@each_optimizer
def test_what_was_asked_and_answered_stays_as_it_was(optimizer):
    run, queries = ls.record(ls.problem(), optimizer), ls.queries()
    pairs = [(d, d.clone()) for _, d in Unrolled().directions(run, queries)]
    assert all(torch.equal(direction, then) for direction, then in pairs)
    assert torch.equal(queries, ls.queries())


def test_for_single_outputs_loss_weighted_curvature_is_exact():
    run = ls.record(ls.problem(), OPTIMIZERS["momentum"])
    torch.testing.assert_close(scores(Unrolled(LossWeighted(), Linear()), run), scores(EXACT, run))


def test_it_is_linear_in_the_query():
    run = ls.record(ls.problem(), OPTIMIZERS["nesterov"])
    one, other = ls.queries(1), ls.queries(2)
    torch.testing.assert_close(
        scores(Unrolled(), run, 2 * one - 3 * other),
        2 * scores(Unrolled(), run, one) - 3 * scores(Unrolled(), run, other),
    )


def test_a_slice_of_a_run_is_a_training_that_ended_there():
    problem = ls.problem(scale=0.7)
    short = replace(problem, batches=problem.batches[:4], rates=problem.rates[:4])
    run = ls.record(problem, OPTIMIZERS["momentum"])
    expected = ls.effect_of_presence(short, OPTIMIZERS["momentum"], ls.queries())
    torch.testing.assert_close(scores(EXACT, run[:4]), expected, rtol=1e-6, atol=1e-9)


def test_samples_never_drawn_score_zero():
    values = scores(Unrolled(), ls.record(ls.problem(), OPTIMIZERS["momentum"]))
    assert values[:, ls.N_TRAIN - 1].abs().max() == 0
    assert (values != 0).any()


def test_the_order_of_visits_within_a_step_does_not_matter_and_names_move_scores():
    run, renamed = ls.record(ls.problem(), OPTIMIZERS["momentum"]), MemoryStore()
    permutation = torch.randperm(ls.N_TRAIN, generator=torch.Generator().manual_seed(2))
    renamed.begin(run.recipe)
    for step in run:
        renamed.append(replace(step, sample_ids=permutation[step.sample_ids]))
    torch.testing.assert_close(scores(Unrolled(), renamed)[:, permutation], scores(Unrolled(), run))
