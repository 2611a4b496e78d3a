"""Curvature with negative eigenvalues, and numbers that are not finite: found early, and named."""

import pytest
import torch
from exact_gradients import N_QUERY, Dense, N
from lightning_models import Plain, loader, mlp, quiet_trainer, vectors
from torch import nn
from torch.utils.data import TensorDataset

from tda_lightning import FullInfluenceFunction, GradientRecorder, attribute_by_gradients
from tda_lightning.full_influence import (
    EKFAC,
    ConjugateGradient,
    GaussNewton,
    Hessian,
    Lanczos,
    ModelCurvature,
    Neumann,
    Objective,
    Woodbury,
)
from tda_lightning.full_influence.woodbury import LowRankCurvature
from tda_lightning.passes.model_state import preserved_state
from tda_lightning.stores import MemoryStore

pytest.importorskip("curvlinops", reason="the extra `solvers` is not installed")
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")

X, Y = vectors(N + N_QUERY)[:]
DATA = TensorDataset(X[:N].double(), Y[:N])
QUERIES = (X[N:].double(), Y[N:])


class Counting(Plain):
    steps = 0

    def training_step(self, batch, batch_idx):
        self.steps += 1
        return super().training_step(batch, batch_idx)


def trained(epochs=5, *callbacks):
    model = Counting(mlp()).double()
    trainer = quiet_trainer(*callbacks, max_epochs=epochs, precision="64-true")
    trainer.fit(model, loader(DATA, 6))
    model.steps = 0
    return model


def ask(model, method, train=DATA, queries=QUERIES, **settings):
    batches = loader(train, 6, shuffle=False)
    return attribute_by_gradients(
        model, batches, queries, method=method, progress=False, **settings
    )


def gap(found, expected):
    return float((found - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize(
    "solver", [ConjugateGradient(1e-10), Neumann(1e-4), Lanczos(1000)], ids=repr
)
def test_the_default_damping_makes_up_for_negative_eigenvalues(solver):
    model = trained()
    exact = Dense(model, *DATA[:])
    values = torch.linalg.eigvalsh(exact.hessian())
    assert float(values[0]) < -0.05 * float(values[-1]), "it should be indefinite here"
    found = ask(model, FullInfluenceFunction(solver, Hessian()))
    damping = float(found.provenance["curvature"].split()[-1])
    spare = damping + float(values[0])
    assert spare == pytest.approx(0.02 * float(values[-1]), rel=0.25)  # of ill condition no more
    again = ask(model, FullInfluenceFunction(solver, Hessian(), damping=damping))
    expected = exact.scores(exact.hessian(), damping, *QUERIES)
    assert gap(again.values, expected) < 1e-3
    assert gap(found.values, expected) < 0.05  # the damping was read in three digits


def test_so_does_the_damping_that_a_run_suggests():
    store = MemoryStore()
    model = trained(5, GradientRecorder(store, snapshots=5))
    method = FullInfluenceFunction(ConjugateGradient(), Hessian())
    suggested = ask(model, FullInfluenceFunction(), run=store).provenance["curvature"]
    found = ask(model, method, run=store).provenance["curvature"]
    assert float(found.split()[-1]) > float(suggested.split()[-1])


def test_curvature_that_is_not_negative_is_damped_as_before():
    model = trained()
    largest = float(torch.linalg.eigvalsh(Dense(model, *DATA[:]).gauss_newton())[-1])
    for solver in (ConjugateGradient(), Neumann(), Lanczos(5)):
        found = ask(model, FullInfluenceFunction(solver)).provenance["curvature"]
        assert float(found.split()[-1]) == pytest.approx(0.02 * largest, rel=0.01)


@pytest.mark.parametrize("solver", [ConjugateGradient(), Neumann(), Neumann(terms=2000)], ids=repr)
def test_negative_eigenvalues_are_found_after_a_few_products(solver):
    model = trained()
    method = FullInfluenceFunction(solver, Hessian(), damping=1e-3)
    with pytest.raises(ValueError, match=r"eigenvalue of -.*more damping.*GaussNewton\(\)"):
        ask(model, method)
    assert model.steps < 2 * 60  # two batches


class Blind(ModelCurvature):
    """A Hessian whose negative eigenvalues nobody has looked for."""

    def operator(self, objective):
        return Hessian().operator(objective)


def test_they_are_also_found_in_curvature_that_does_not_tell_of_them():
    model = trained()
    with pytest.raises(ValueError, match=r"has an eigenvalue of -.* or less, and damping"):
        ask(model, FullInfluenceFunction(ConjugateGradient(), Blind()))
    assert model.steps < 2 * 60


@pytest.mark.parametrize("tolerance", [1e-2, 1e-4])
def test_conjugate_gradients_return_what_is_within_their_tolerance_or_nothing(tolerance):
    torch.manual_seed(0)
    kept = LowRankCurvature(
        torch.randn(40, 60).double() * torch.logspace(0, -2, 40).double()[:, None]
    )
    damping, rows = 1e-3 * kept.largest(), torch.randn(5, 60).double()
    arrived = []
    for products in range(1, 80):
        solver = ConjugateGradient(tolerance, products)
        try:
            found = solver.inverse(kept, damping)(rows)
        except ValueError:
            continue
        missing = (kept @ found.mT).mT + damping * found - rows
        assert float((missing.norm(dim=1) / rows.norm(dim=1)).max()) <= 1.01 * tolerance
        arrived.append(products)
    assert 1 < arrived[0] < 80, "some do not arrive here, and some do"


SOLVERS = [Woodbury(), ConjugateGradient(), Neumann(), Lanczos(5)]


@pytest.mark.parametrize("method", list(map(FullInfluenceFunction, SOLVERS)), ids=repr)
def test_weights_queries_and_data_that_are_not_finite_are_named(method):
    model, (x, y) = trained(), DATA[:]
    wrong = x.clone()
    wrong[4, 2] = torch.nan
    with pytest.raises(ValueError, match=r"`train_loader` is not finite.*NaN or infinite"):
        ask(model, method, TensorDataset(wrong, y))
    batches = loader(TensorDataset(wrong, y), 6)
    with pytest.raises(ValueError, match="`curvature_loader` is not finite"):
        ask(model, method, curvature_loader=batches)
    with pytest.raises(ValueError, match="gradient of query 1 is not finite"):
        ask(model, method, queries=(wrong[3:6], y[3:6]))
    with torch.no_grad():
        model.net[0].bias[3] = torch.inf
    with pytest.raises(ValueError, match=r"weights of `model` are not finite: `net.0.bias`"):
        ask(model, method)


@pytest.mark.parametrize(
    "method",
    [FullInfluenceFunction(EKFAC()), FullInfluenceFunction(ConjugateGradient(), Hessian(), 9.0)],
    ids=repr,
)
def test_data_that_are_not_finite_are_named_whatever_the_curvature(method):
    torch.manual_seed(3)
    model = Plain(nn.Sequential(nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 3))).double()
    x, y = DATA[:]
    wrong = x.clone()
    wrong[4, 2] = torch.nan
    with pytest.raises(ValueError, match="`train_loader` is not finite"):
        ask(model, method, TensorDataset(wrong, y))


def test_a_snapshot_whose_weights_are_not_finite_is_found():
    store = MemoryStore()
    model = trained(5, GradientRecorder(store, snapshots=5))
    weights = {name: one.clone() for name, one in store.weights_at(5).items()}
    weights["net.0.bias"][3] = torch.nan
    store.keep_weights(5, weights)
    with pytest.raises(ValueError, match=r"snapshot before step 5.*`net.0.bias`"):
        ask(model, FullInfluenceFunction(), run=store)


@pytest.mark.parametrize("solver", [Woodbury(), ConjugateGradient()], ids=repr)
def test_what_fails_on_the_way_leaves_no_trace(solver):
    store = MemoryStore()
    model = trained(5, GradientRecorder(store, snapshots=5))
    own = {name: one.clone() for name, one in model.state_dict().items()}
    (x, y), method = DATA[:], FullInfluenceFunction(solver)
    wrong, batches = x.clone(), loader(DATA, 6)
    wrong[4, 2] = torch.nan
    for settings in ({}, {"curvature_loader": batches}):
        with pytest.raises(ValueError, match="NaN or infinite") as failure:
            ask(model, method, TensorDataset(wrong, y), run=store, **settings)
        assert failure.tb  # which holds all that was not closed
        assert all(torch.equal(one, own[name]) for name, one in model.state_dict().items())
        assert model.training
        assert "log" not in vars(model)


class Exhausted(Plain):
    def training_step(self, batch, batch_idx):
        raise torch.cuda.OutOfMemoryError("out of memory")


def test_too_little_memory_is_not_taken_for_a_fault_of_the_step():
    model = Exhausted(mlp()).double()
    parameters, batches = list(model.parameters()), loader(DATA)
    objective = Objective.of(model, parameters, batches, progress=False)
    with preserved_state(model, "eval"), pytest.raises(torch.cuda.OutOfMemoryError):
        GaussNewton().operator(objective)


@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
def test_where_there_is_no_curvature_damping_must_be_given(solver):
    model = Plain(mlp(), lambda outputs, y: 0 * nn.functional.cross_entropy(outputs, y)).double()
    with pytest.raises(ValueError, match="default damping is 0; expected a finite number above 0"):
        ask(model, FullInfluenceFunction(solver))
    given = FullInfluenceFunction(solver, damping=0.5)
    assert not ask(model, given).values.any()


def test_it_can_be_asked_where_gradients_are_off():
    model, method = trained(), FullInfluenceFunction(ConjugateGradient())
    expected = ask(model, method).values
    with torch.no_grad():
        assert torch.equal(ask(model, method).values, expected)


class Skipping(Plain):
    def training_step(self, batch, batch_idx):
        return None if len(batch[0]) > N_QUERY else super().training_step(batch, batch_idx)


def test_a_step_without_a_loss_says_so():
    model = Skipping(mlp()).double()
    with pytest.raises(ValueError, match=r"on `train_loader`.* it returned nothing; expected the"):
        ask(model, FullInfluenceFunction(ConjugateGradient()))
