"""Woodbury, and full gradients along a run, against dense matrices and unsketched runs."""

import pytest
import torch
from exact_gradients import N_QUERY, DenseObjective, N, regression, to_dense
from lightning_models import Plain, loader, mlp, quiet_trainer, vectors
from torch import nn
from torch.nn import functional
from torch.utils.data import TensorDataset

from tda_lightning import (
    FullInfluenceFunction,
    GradientRecorder,
    HDF5Store,
    Identity,
    InfluenceFunction,
    attribute,
    attribute_by_gradients,
)
from tda_lightning.attribution import SampledLabels
from tda_lightning.full_influence import EKFAC, ConjugateGradient, GaussNewton, Hessian, Woodbury
from tda_lightning.full_influence.full_gradients import FullGradients
from tda_lightning.full_influence.woodbury import LowRankCurvature
from tda_lightning.gradients.parameter_selection import select_parameters
from tda_lightning.passes.model_state import preserved_state
from tda_lightning.stores import MemoryStore

# The dense references use forward mode, whose torch code is deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")

X, Y = vectors(N + N_QUERY)[:]
CLASSES = TensorDataset(X[:N].double(), Y[:N])
# One output under squared error: labels drawn from the model have no noise.
NUMBERS = TensorDataset(*(part[:N] for part in regression(N + N_QUERY, c=1)))
QUERIES = tuple(part[N:] for part in regression(N + N_QUERY, c=1))
DEFAULT = FullInfluenceFunction()
OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.05, weight_decay=0.01),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.01),
    "Adam with two rates": lambda p: torch.optim.Adam(
        [{"params": (p := list(p))[:2]}, {"params": p[2:], "lr": 0.002}], lr=0.01
    ),
}


def regressor(optimizer=OPTIMIZERS["SGD"]):
    torch.manual_seed(3)
    net = nn.Sequential(nn.Linear(7, 5), nn.Tanh(), nn.LayerNorm(5), nn.Linear(5, 1))
    return Plain(net, functional.mse_loss, optimizer).double()


def operator_of(model, data, solver, reduction="mean"):
    selection = select_parameters(model)
    gradients = FullGradients(model, selection, None, reduction)
    objective = gradients.objective(loader(data, 4), None, progress=False)  # ragged: 4, 4, 3
    with preserved_state(model, "eval"):
        return solver.operator(objective, GaussNewton())


def score(model, method=DEFAULT, **settings):
    train = loader(NUMBERS, 4, shuffle=False)
    return attribute_by_gradients(model, train, QUERIES, method=method, progress=False, **settings)


def gap(actual, expected):
    return float((actual - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("draws", [1, 50])  # fewer rows than parameters, and more
def test_the_curvature_of_sampled_labels_is_inverted_exactly(draws):
    model, solver = Plain(mlp()).double(), Woodbury(draws)
    operator = operator_of(model, CLASSES, solver)
    d = operator.shape[0]
    assert N < d < 50 * N
    assert d == sum(parameter.numel() for parameter in model.parameters())
    matrix, vectors_ = to_dense(operator), torch.randn(5, d, dtype=torch.float64)
    damped = matrix + 0.03 * torch.eye(d, dtype=torch.float64)
    expected = torch.linalg.solve(damped, vectors_.mT).mT
    assert gap(solver.inverse(operator, 0.03)(vectors_), expected) < 1e-10
    largest = float(torch.linalg.eigvalsh(matrix)[-1])
    assert solver.default_damping(operator) == pytest.approx(0.02 * largest)


@pytest.mark.slow
def test_many_draws_are_the_gauss_newton_matrix():
    model = Plain(mlp()).double()
    exact = DenseObjective(model, *CLASSES[:]).gauss_newton()
    errors = []
    for draws in (4, 100):
        matrix = to_dense(operator_of(model, CLASSES, Woodbury(draws)))
        errors.append(float((matrix - exact).norm() / exact.norm()))
    assert errors[1] < 0.15
    assert errors[0] > 3 * errors[1]  # five times, on average


@pytest.mark.parametrize(("reduction", "scale"), [("mean", 1), ("sum", 1 / N)])
@pytest.mark.parametrize("draws", [1, 5])
def test_without_noise_one_draw_is_the_gauss_newton_matrix(reduction, scale, draws):
    model = regressor()
    model.loss = nn.MSELoss(reduction=reduction)
    exact = DenseObjective(model, *NUMBERS[:])
    operator = operator_of(model, NUMBERS, Woodbury(draws), reduction)
    assert gap(to_dense(operator), exact.gauss_newton() * scale) < 1e-10
    method = FullInfluenceFunction(Woodbury(draws), damping=0.1)
    expected = exact.scores(exact.gauss_newton() * scale, 0.1, *QUERIES)
    assert gap(score(model, method, reduction=reduction).values, expected) < 1e-10


def test_single_precision_is_enough():
    model = regressor()
    expected = score(model).values
    x, y = NUMBERS[:]
    train = loader(TensorDataset(x.float(), y.float()), 4, shuffle=False)
    queries = tuple(part.float() for part in QUERIES)
    single = attribute_by_gradients(model.float(), train, queries, method=DEFAULT, progress=False)
    assert single.values.dtype == torch.float32
    assert gap(single.values.double(), expected) < 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_damping_is_refused_only_below_the_precision_of_the_number_format(dtype):
    torch.manual_seed(0)
    rows = torch.randn(40, 90).to(dtype) * torch.logspace(0, -4, 40).to(dtype)[:, None]
    curvature, exact = LowRankCurvature(rows), LowRankCurvature(rows.double())
    # The two large terms cancel for gradients in the span of the rows.
    gradients = torch.randn(3, 40).to(dtype) @ rows
    floor = 8 * torch.finfo(dtype).eps * curvature.largest_eigenvalue()
    actual = curvature.inverse(1.01 * floor)(gradients)
    expected = exact.inverse(1.01 * floor)(gradients.double())
    scores, truth = actual.double() @ rows.double().mT, expected @ rows.double().mT
    assert float((scores - truth).norm() / truth.norm()) < 0.1
    with pytest.raises(ValueError, match=r"too small relative to.*largest eigenvalue, in torch"):
        curvature.inverse(0.99 * floor)


def trained(optimizer, store, *, batch_size=4, epochs=4, snapshots=2, **settings):
    model = regressor(OPTIMIZERS[optimizer])
    recorder = GradientRecorder(store, projector=Identity(), snapshots=snapshots, **settings)
    trainer = quiet_trainer(recorder, max_epochs=epochs, precision="64-true")
    trainer.fit(model, loader(NUMBERS, batch_size))
    return model


@pytest.mark.parametrize("at", ["now", "snapshots"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_along_a_run_scores_equal_the_influence_function_of_unsketched_rows(optimizer, at):
    store = MemoryStore()
    # Every step visits every sample, and every step has its snapshot.
    model = trained(optimizer, store, batch_size=N, epochs=9, snapshots=1, curvature="fisher")
    assert len(store) == len(store.snapshots()) == 9
    method = InfluenceFunction(SampledLabels())
    expected = attribute(store, model, QUERIES, method=method, at=at, progress=False)
    actual = score(model, run=store, at=at)
    assert gap(actual.values, expected.values) < 1e-6  # A store's weights are in single precision.
    assert actual.provenance["along"] == "9 snapshots, steps 0 to 8"
    assert actual.provenance["weights"] == expected.provenance["weights"]


def scales(store, blocks):
    """Yield the preconditioner at each snapshot as one factor per parameter."""
    for snapshot in store.snapshots():
        preconditioner = store.preconditioner(snapshot)
        parts, row, column = [], 0, 0
        for block in blocks:
            rows = preconditioner.rows[row:][: block.rows]
            columns = preconditioner.columns[column:][: block.columns]
            parts.append(torch.outer(rows, columns))
            row, column = row + block.rows, column + block.columns
        yield torch.cat([part.flatten() for part in parts])


@pytest.mark.parametrize("solver", [Woodbury(), ConjugateGradient(1e-10)], ids=repr)
def test_gradients_and_curvature_are_means_over_the_snapshots(solver):
    if isinstance(solver, ConjugateGradient):
        pytest.importorskip("curvlinops", reason="the extra `solvers` is not installed")
    store = MemoryStore()
    model = trained("AdamW", store, snapshots=3)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    assert (len(store), store.snapshots()) == (12, [0, 3, 6, 9])
    curvature, train, queries = [], [], []
    for snapshot, scale in zip(store.snapshots(), scales(store, store.recipe.blocks), strict=True):
        model.load_state_dict(store.weights_at(snapshot))
        exact = DenseObjective(model, *NUMBERS[:])
        curvature.append(scale[:, None] * exact.gauss_newton() * scale)
        train.append(exact.gradients(*NUMBERS[:]) * scale)
        queries.append(exact.gradients(*QUERIES) * scale)
    model.load_state_dict(before)

    def mean(parts):
        return torch.stack(parts).mean(dim=0)

    damped = mean(curvature) + 0.2 * torch.eye(len(curvature[0]), dtype=torch.float64)
    method = FullInfluenceFunction(solver, damping=0.2)
    for at, gradients in (("snapshots", mean(queries[2:])), (3, queries[1])):
        expected = gradients @ torch.linalg.solve(damped, mean(train).mT) / N
        assert gap(score(model, method, run=store, at=at).values, expected) < 1e-8
    assert all(torch.equal(w, before[name]) for name, w in model.state_dict().items())


@pytest.mark.filterwarnings("ignore:GradientRecorder. not recorded")
def test_chosen_layers_use_their_part_of_the_preconditioner():
    store = MemoryStore()
    model = trained("AdamW", store, batch_size=N, epochs=3, snapshots=1, curvature="fisher")
    head = FullInfluenceFunction(layers=["net.3"])
    head_store = MemoryStore()
    head_model = trained(
        "AdamW",
        head_store,
        batch_size=N,
        epochs=3,
        snapshots=1,
        curvature="fisher",
        layers=["net.3"],
    )
    method = InfluenceFunction(SampledLabels())
    expected = attribute(
        head_store, head_model, QUERIES, method=method, at="now", progress=False
    ).values
    assert gap(score(model, head, run=store).values, expected) < 1e-6


def test_a_run_is_opened_by_its_path_and_sets_the_reduction(tmp_path):
    model = trained("SGD", HDF5Store(tmp_path / "run.tda"))
    actual = score(model, run=str(tmp_path / "run.tda"))
    assert torch.equal(actual.values, score(model, run=HDF5Store.open(tmp_path / "run.tda")).values)
    with pytest.warns(UserWarning, match="`reduction` is 'sum', but the first loss is the mean"):
        summed = trained("SGD", store := MemoryStore(), reduction="sum")
    summed.loss = nn.MSELoss(reduction="sum")
    inferred, given = score(summed, run=store), score(summed, run=store, reduction="sum")
    assert torch.equal(inferred.values, given.values)


@pytest.mark.filterwarnings("ignore:GradientRecorder. not recorded")
def test_unsuitable_runs_and_methods_are_refused():
    store, bare = MemoryStore(), MemoryStore()
    model = trained("AdamW", store)
    trained("AdamW", bare, snapshots=0)
    with pytest.raises(ValueError, match="`at=3` was passed without a run; expected `run=`"):
        score(model, at=3)
    with pytest.raises(ValueError, match="has no snapshots; expected at least one"):
        score(model, run=bare)
    with pytest.raises(ValueError, match="no snapshot of the weights before step 3; expected one"):
        score(model, run=store, at=3)
    with pytest.raises(ValueError, match=r"would hold 11 rows of 56 numbers.*: 0.0 GB; expected"):
        score(model, FullInfluenceFunction(Woodbury(draws=1, max_gb=1e-6)))
    with pytest.raises(ValueError, match=r"expected `curvature=GaussNewton\(\)`, got `Hessian"):
        score(model, FullInfluenceFunction(Woodbury(), Hessian()))
    part = trained("AdamW", partly := MemoryStore(), layers=["net.0"])
    with pytest.raises(
        ValueError, match=r"did not record `net.2.weight` as it is in the model; expected"
    ):
        score(part, run=partly)


def test_ekfac_refuses_a_run():
    pytest.importorskip("curvlinops", reason="the extra `solvers` is not installed")
    store = MemoryStore()
    model = trained("SGD", store)
    with pytest.raises(ValueError, match="and not with the 6 snapshots of the run"):
        score(model, FullInfluenceFunction(EKFAC()), run=store)
