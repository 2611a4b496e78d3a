"""Negative eigenvalues and non-finite numbers raise early, with errors that name the cause."""

import pytest
import torch
from exact_gradients import N_QUERY, DenseObjective, N
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


def score(model, method, train=DATA, queries=QUERIES, **settings):
    batches = loader(train, 6, shuffle=False)
    return attribute_by_gradients(
        model, batches, queries, method=method, progress=False, **settings
    )


def gap(actual, expected):
    return float((actual - expected).abs().max() / expected.abs().max())


@pytest.mark.slow
@pytest.mark.parametrize(
    "solver", [ConjugateGradient(1e-10), Neumann(1e-4), Lanczos(1000)], ids=repr
)
def test_the_default_damping_compensates_for_negative_eigenvalues(solver):
    model = trained()
    exact = DenseObjective(model, *DATA[:])
    values = torch.linalg.eigvalsh(exact.hessian())
    assert float(values[0]) < -0.05 * float(values[-1]), "the Hessian should be indefinite here"
    actual = score(model, FullInfluenceFunction(solver, Hessian()))
    damping = float(actual.provenance["curvature"].split()[-1])
    spare = damping + float(values[0])
    assert spare == pytest.approx(0.02 * float(values[-1]), rel=0.25)  # no worse conditioned
    repeated = score(model, FullInfluenceFunction(solver, Hessian(), damping=damping))
    expected = exact.scores(exact.hessian(), damping, *QUERIES)
    assert gap(repeated.values, expected) < 1e-3
    assert gap(actual.values, expected) < 0.05  # the provenance rounds the damping to three digits


def test_the_damping_that_a_run_suggests_compensates_for_negative_eigenvalues():
    store = MemoryStore()
    model = trained(5, GradientRecorder(store, snapshots=5))
    method = FullInfluenceFunction(ConjugateGradient(), Hessian())
    suggested = score(model, FullInfluenceFunction(), run=store).provenance["curvature"]
    actual = score(model, method, run=store).provenance["curvature"]
    assert float(actual.split()[-1]) > float(suggested.split()[-1])


@pytest.mark.slow
def test_semidefinite_curvature_gets_no_additional_damping():
    model = trained()
    largest = float(torch.linalg.eigvalsh(DenseObjective(model, *DATA[:]).gauss_newton())[-1])
    for solver in (ConjugateGradient(), Neumann(), Lanczos(5)):
        actual = score(model, FullInfluenceFunction(solver)).provenance["curvature"]
        assert float(actual.split()[-1]) == pytest.approx(0.02 * largest, rel=0.01)


@pytest.mark.parametrize("solver", [ConjugateGradient(), Neumann(), Neumann(terms=2000)], ids=repr)
def test_negative_eigenvalues_are_found_after_a_few_products(solver):
    model = trained()
    method = FullInfluenceFunction(solver, Hessian(), damping=1e-3)
    with pytest.raises(ValueError, match=r"eigenvalue of -.*Increase `damping`.*GaussNewton\(\)"):
        score(model, method)
    assert model.steps < 2 * 60  # two batches


class UncheckedHessian(ModelCurvature):
    """A Hessian that does not report its negative eigenvalues."""

    def operator(self, objective):
        return Hessian().operator(objective)


def test_negative_eigenvalues_are_found_if_the_curvature_does_not_report_them():
    model = trained()
    with pytest.raises(ValueError, match=r"has an eigenvalue of -.* or less, and damping"):
        score(model, FullInfluenceFunction(ConjugateGradient(), UncheckedHessian()))
    assert model.steps < 2 * 60


@pytest.mark.parametrize("tolerance", [1e-2, 1e-4])
def test_conjugate_gradients_meet_their_tolerance_or_raise(tolerance):
    torch.manual_seed(0)
    curvature = LowRankCurvature(
        torch.randn(40, 60).double() * torch.logspace(0, -2, 40).double()[:, None]
    )
    damping, rows = 1e-3 * curvature.largest_eigenvalue(), torch.randn(5, 60).double()
    converged = []
    for products in range(1, 80):
        solver = ConjugateGradient(tolerance, products)
        try:
            solved = solver.inverse(curvature, damping)(rows)
        except ValueError:
            continue
        residuals = (curvature @ solved.mT).mT + damping * solved - rows
        assert float((residuals.norm(dim=1) / rows.norm(dim=1)).max()) <= 1.01 * tolerance
        converged.append(products)
    assert 1 < converged[0] < 80, "some limits should be too low here, and some should suffice"


SOLVERS = [Woodbury(), ConjugateGradient(), Neumann(), Lanczos(5)]


@pytest.mark.parametrize("method", list(map(FullInfluenceFunction, SOLVERS)), ids=repr)
def test_non_finite_weights_queries_and_data_are_named(method):
    model, (x, y) = trained(), DATA[:]
    wrong = x.clone()
    wrong[4, 2] = torch.nan
    with pytest.raises(ValueError, match=r"`train_loader` is not finite.*NaN or infinite"):
        score(model, method, TensorDataset(wrong, y))
    batches = loader(TensorDataset(wrong, y), 6)
    with pytest.raises(ValueError, match="`curvature_loader` is not finite"):
        score(model, method, curvature_loader=batches)
    with pytest.raises(ValueError, match="gradient of query 1 is not finite"):
        score(model, method, queries=(wrong[3:6], y[3:6]))
    with torch.no_grad():
        model.net[0].bias[3] = torch.inf
    with pytest.raises(ValueError, match=r"weights of `model` are not finite: `net.0.bias`"):
        score(model, method)


@pytest.mark.parametrize(
    "method",
    [FullInfluenceFunction(EKFAC()), FullInfluenceFunction(ConjugateGradient(), Hessian(), 9.0)],
    ids=repr,
)
def test_non_finite_data_are_named_for_every_curvature(method):
    torch.manual_seed(3)
    model = Plain(nn.Sequential(nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 3))).double()
    x, y = DATA[:]
    wrong = x.clone()
    wrong[4, 2] = torch.nan
    with pytest.raises(ValueError, match="`train_loader` is not finite"):
        score(model, method, TensorDataset(wrong, y))


def test_a_snapshot_with_non_finite_weights_is_named():
    store = MemoryStore()
    model = trained(5, GradientRecorder(store, snapshots=5))
    weights = {name: weight.clone() for name, weight in store.weights_at(5).items()}
    weights["net.0.bias"][3] = torch.nan
    store.keep_weights(5, weights)
    with pytest.raises(ValueError, match=r"snapshot before step 5.*`net.0.bias`"):
        score(model, FullInfluenceFunction(), run=store)


@pytest.mark.parametrize("solver", [Woodbury(), ConjugateGradient()], ids=repr)
def test_failures_leave_the_model_unchanged(solver):
    store = MemoryStore()
    model = trained(5, GradientRecorder(store, snapshots=5))
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    (x, y), method = DATA[:], FullInfluenceFunction(solver)
    wrong, batches = x.clone(), loader(DATA, 6)
    wrong[4, 2] = torch.nan
    for settings in ({}, {"curvature_loader": batches}):
        with pytest.raises(ValueError, match="NaN or infinite") as failure:
            score(model, method, TensorDataset(wrong, y), run=store, **settings)
        assert failure.tb  # its frames keep unclosed generators alive
        assert all(torch.equal(w, before[name]) for name, w in model.state_dict().items())
        assert model.training
        assert "log" not in vars(model)


class Exhausted(Plain):
    def training_step(self, batch, batch_idx):
        raise torch.cuda.OutOfMemoryError("out of memory")


def test_out_of_memory_errors_are_passed_on():
    model = Exhausted(mlp()).double()
    parameters, batches = list(model.parameters()), loader(DATA)
    objective = Objective.of(model, parameters, batches, progress=False)
    with preserved_state(model, "eval"), pytest.raises(torch.cuda.OutOfMemoryError):
        GaussNewton().operator(objective)


@pytest.mark.filterwarnings("ignore:.*have a gradient of zero")
@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
def test_zero_curvature_requires_a_damping(solver):
    model = Plain(mlp(), lambda outputs, y: 0 * nn.functional.cross_entropy(outputs, y)).double()
    with pytest.raises(ValueError, match="default damping is 0; expected a finite number above 0"):
        score(model, FullInfluenceFunction(solver))
    given = FullInfluenceFunction(solver, damping=0.5)
    assert not score(model, given).values.any()


def test_attribution_works_inside_no_grad():
    model, method = trained(), FullInfluenceFunction(ConjugateGradient())
    expected = score(model, method).values
    with torch.no_grad():
        assert torch.equal(score(model, method).values, expected)


class Skipping(Plain):
    def training_step(self, batch, batch_idx):
        return None if len(batch[0]) > N_QUERY else super().training_step(batch, batch_idx)


def test_a_step_without_a_loss_is_refused():
    model = Skipping(mlp()).double()
    with pytest.raises(
        ValueError, match=r"on `train_loader`.* the step returned None; expected the"
    ):
        score(model, FullInfluenceFunction(ConjugateGradient()))
