"""Influence functions with full gradients, against dense matrices and refits."""

import pytest
import torch
from exact_gradients import N_QUERY, DenseObjective, N, regression, to_dense
from lightning_models import Plain, loader, mlp, quiet_trainer, vectors
from torch import nn
from torch.nn import functional
from torch.utils.data import Subset, TensorDataset, WeightedRandomSampler

from tda_lightning import (
    FullInfluenceFunction,
    GradientRecorder,
    Identity,
    InfluenceFunction,
    LogProbability,
    attribute,
    attribute_by_gradients,
    record,
)
from tda_lightning.attribution import SampledLabels, damping_of
from tda_lightning.full_influence import (
    EKFAC,
    ConjugateGradient,
    GaussNewton,
    Hessian,
    Lanczos,
    Neumann,
    Objective,
    Woodbury,
)
from tda_lightning.full_influence.objective import columns_of
from tda_lightning.gradients.parameter_selection import select_parameters
from tda_lightning.passes.model_state import preserved_state
from tda_lightning.passes.queries import identified_rows
from tda_lightning.stores import MemoryStore
from tda_lightning.stores.recipe import Recipe

pytest.importorskip("curvlinops", reason="the extra `solvers` is not installed")
# The dense references use forward mode, whose torch code is deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")

X, Y = vectors(N + N_QUERY)[:]
X = X.double()
DATA = TensorDataset(X[:N], Y[:N])
QUERIES = (X[N:], Y[N:])
DAMPING = 0.1
SHORT = ConjugateGradient(tolerance=1e-9, products=5)
EXACT = FullInfluenceFunction(ConjugateGradient(tolerance=1e-10), damping=DAMPING)


def classifier():
    return Plain(mlp()).double()


def score(model, method=EXACT, data=DATA, queries=QUERIES, shuffle=True, **settings):
    batches = loader(data, 6, shuffle=shuffle)  # a ragged last batch
    return attribute_by_gradients(
        model, batches, queries, method=method, progress=False, **settings
    ).values


def dense(model, data=DATA):
    return DenseObjective(model, *data[:])


def gap(actual, expected):
    return float((actual - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize(
    ("solver", "tolerance"),
    [
        (ConjugateGradient(tolerance=1e-10), 1e-9),
        (ConjugateGradient(), 1e-5),
        pytest.param(Neumann(remainder=1e-5), 1e-5, marks=pytest.mark.slow),
        (Neumann(), 1e-2),
        (Lanczos(rank=N * 3), 1e-9),  # the full rank of the matrix
        (Lanczos(rank=1000), 1e-9),
    ],
    ids=repr,
)
def test_solvers_agree_with_the_dense_inverse(solver, tolerance):
    model = classifier()
    exact = dense(model)
    expected = exact.scores(exact.gauss_newton(), DAMPING, *QUERIES)
    assert gap(score(model, FullInfluenceFunction(solver, damping=DAMPING)), expected) < tolerance


def test_the_hessian_is_that_of_the_training_step():
    model = classifier()
    exact = dense(model)
    damping = 0.2 - float(torch.linalg.eigvalsh(exact.hessian())[0])
    assert damping > 0.25, "the Hessian should have negative eigenvalues here"
    expected = exact.scores(exact.hessian(), damping, *QUERIES)
    for solver in (ConjugateGradient(tolerance=1e-10), Lanczos(rank=1000)):
        method = FullInfluenceFunction(solver, Hessian(), damping=damping)
        assert gap(score(model, method), expected) < 1e-6


def test_lanczos_inverts_the_largest_eigenvalues_and_damps_the_rest():
    model = classifier()
    exact = dense(model)
    values, vectors_ = torch.linalg.eigh(exact.gauss_newton())
    values[:-5] = 0
    expected = exact.scores(vectors_ * values @ vectors_.mT, DAMPING, *QUERIES)
    actual = score(model, FullInfluenceFunction(Lanczos(rank=5), damping=DAMPING))
    assert gap(actual, expected) < 1e-9


def scaled_mse(outputs, y):
    return 0.5 * (2 * functional.mse_loss(outputs, y, reduction="none")).mean()


@pytest.mark.parametrize(
    ("loss", "reduction"),
    [
        (functional.mse_loss, "mean"),
        (nn.MSELoss(reduction="sum"), "sum"),
        (scaled_mse, "mean"),
        (lambda o, y: 3 * functional.mse_loss(o, y), "mean"),
    ],
    ids=["mean", "sum", "elementwise", "scaled"],
)
def test_ekfac_is_exact_for_a_linear_layer_under_squared_error(loss, reduction):
    x, y = regression(N + N_QUERY)
    model = Plain(nn.Linear(7, 2), loss).double()
    data, queries = TensorDataset(x[:N], y[:N]), (x[N:], y[N:])
    exact = dense(model, data)
    matrix = exact.hessian() / (N if reduction == "sum" else 1)
    method = FullInfluenceFunction(EKFAC(), damping=0.3)
    actual = score(model, method, data, queries, reduction=reduction)
    assert gap(actual, exact.scores(matrix, 0.3, *queries)) < 1e-9


def test_ekfac_inverts_its_approximation():
    torch.manual_seed(3)
    model = Plain(nn.Sequential(nn.Linear(7, 5), nn.ReLU(inplace=True), nn.Linear(5, 3))).double()
    objective = Objective.of(model, list(model.parameters()), loader(DATA), progress=False)
    solver, exact = EKFAC(), dense(model)
    with preserved_state(model, "eval"):
        operator = solver.operator(objective, GaussNewton())
    expected = exact.scores(to_dense(operator), DAMPING, *QUERIES)
    assert gap(score(model, FullInfluenceFunction(solver, damping=DAMPING)), expected) < 1e-9
    trace = float(exact.gauss_newton().trace())
    assert operator.mean_eigenvalue() * operator.shape[0] == pytest.approx(trace)
    sampled = score(model, FullInfluenceFunction(EKFAC(labels="sampled"), damping=DAMPING))
    assert 0.01 < gap(sampled, expected) < 1


def test_ekfac_is_exact_for_a_convolution_over_the_whole_input():
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(N + N_QUERY, 2, 3, 5, generator=generator, dtype=torch.float64)
    y = torch.randn(N + N_QUERY, 3, generator=generator, dtype=torch.float64)
    net = nn.Sequential(nn.Conv2d(2, 3, (3, 5)), nn.Flatten())
    model, data = Plain(net, functional.mse_loss).double(), TensorDataset(x[:N], y[:N])
    exact, queries = dense(model, data), (x[N:], y[N:])
    actual = score(model, FullInfluenceFunction(EKFAC(), damping=0.3), data, queries)
    assert gap(actual, exact.scores(exact.hessian(), 0.3, *queries)) < 1e-9


def fit_ridge(x, y, shares, decay):
    """Return the weights that minimise the weighted mean squared error with weight decay."""
    matrix = 2 * (x * shares[:, None]).mT @ x / len(x) + decay * torch.eye(x.shape[1]).double()
    return torch.linalg.solve(matrix, 2 * (x * shares[:, None]).mT @ y / len(x))


def test_scores_predict_reweighting_in_ridge_regression_to_second_order():
    x, y = regression(N + N_QUERY, c=1)
    train, queries, decay = (x[:N], y[:N]), (x[N:], y[N:]), 0.3
    model = Plain(nn.Linear(7, 1, bias=False), functional.mse_loss).double()
    equal = torch.ones(N, dtype=torch.float64)
    model.net.weight.data = fit_ridge(*train, equal, decay).mT
    method = FullInfluenceFunction(ConjugateGradient(tolerance=1e-12), damping=decay)
    scores = score(model, method, TensorDataset(*train), queries)

    def losses(weights):
        return (queries[0] @ weights - queries[1]).square()[:, 0]

    errors = []
    for share in (0.02, 0.01):
        weights = equal.clone()
        weights[4] -= share
        refitted = fit_ridge(*train, weights, decay)
        increase = losses(refitted) - losses(model.net.weight.data.mT)
        errors.append((increase - share * scores[:, 4]).abs())
    assert (errors[0] / errors[1]).tolist() == pytest.approx([4, 4, 4], rel=0.05)


def test_scores_equal_the_influence_function_of_an_unsketched_run():
    x, y = regression(12 + N_QUERY, c=1)
    torch.manual_seed(3)
    net = nn.Sequential(nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 1))
    model, data = Plain(net, functional.mse_loss).double(), TensorDataset(x[:12], y[:12])
    run, queries = MemoryStore(), (x[12:], y[12:])
    recorder = GradientRecorder(run, projector=Identity())
    quiet_trainer(recorder).fit(model, loader(data, 4))
    damping = damping_of(run)
    # One output under squared error: sampled labels have no noise.
    last = record(model, loader(data, 4), like=run, labels="sampled", progress=False)
    sketched = InfluenceFunction(
        SampledLabels(), damping=damping, rows="last visit", curvature_from=last, rows_from=last
    )
    expected = attribute(run, model, queries, method=sketched, at="now", progress=False).values
    method = FullInfluenceFunction(ConjugateGradient(1e-10), damping=damping)
    assert gap(score(model, method, data, queries), expected) < 1e-6
    assert damping == pytest.approx(1.5 / (6 * 0.1))


@pytest.mark.parametrize("batch_size", [1, 5])
def test_columns_of_rows_are_matched_to_parameters(batch_size):
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(2, 3, (2, 3)),
        nn.GroupNorm(3, 3),
        nn.Flatten(),
        nn.Unflatten(1, (3, 4)),
        nn.TransformerEncoderLayer(4, 2, 5, dropout=0.0, batch_first=True),
        nn.GRU(4, 3, batch_first=True),
        Last(),
        nn.Linear(3, 3, bias=False),
    )
    model = Plain(net).double()
    x, y = torch.randn(batch_size, 2, 3, 4).double(), torch.arange(batch_size) % 3
    selection = select_parameters(model)
    size = sum(block.size for block in selection.blocks)
    recipe = Recipe(selection.blocks, (), Identity().to_dict(), size, "float64")
    rows = identified_rows(model, (x, y), recipe, progress=False).rows
    vectors_ = rows[:, columns_of(selection).argsort()]
    for vector, inputs, label in zip(vectors_, x, y, strict=True):
        loss = functional.cross_entropy(net(inputs[None]), label[None])
        grads = torch.autograd.grad(loss, selection.all_parameters())
        torch.testing.assert_close(vector, torch.cat([grad.flatten() for grad in grads]))
    assert set(selection.all_parameters()) == set(model.parameters())


class Last(nn.Module):
    def forward(self, gru_output):
        return gru_output[0][:, -1]


@pytest.mark.parametrize("solver", [ConjugateGradient(1e-10), EKFAC()], ids=repr)
def test_permuting_training_samples_permutes_scores(solver):
    torch.manual_seed(3)
    model = Plain(nn.Sequential(nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 3))).double()
    order = [5, 0, 3, 7, 1, 2, 4, 6, 8, 10, 9]
    x, y = DATA[:]
    method = FullInfluenceFunction(solver, damping=DAMPING)
    moved = score(model, method, TensorDataset(x[order], y[order]))
    assert gap(moved, score(model, method)[:, order]) < 1e-8


def test_scores_are_linear_in_the_query():
    model, (x, y) = classifier(), QUERIES
    other = (y + 1) % 3

    def mixture(module, batch):
        losses = [
            functional.cross_entropy(module.net(x), to, reduction="none") for to in (y, other)
        ]
        return losses[1] - 2 * losses[0]  # queries raise a target

    expected = 2 * score(model) - score(model, queries=(x, other))
    assert gap(score(model, target=mixture), expected) < 1e-8


def test_the_log_probability_of_labels_scores_as_the_loss():
    model = classifier()
    target = LogProbability(outputs=lambda module, batch: module.net(batch[0]))
    assert gap(score(model, target=target), score(model)) < 1e-9


def test_queries_come_in_a_batch_or_a_loader_and_are_solved_in_parts():
    model = classifier()
    in_parts = FullInfluenceFunction(EXACT.solver, damping=DAMPING, query_batch_size=2)
    batches = loader(TensorDataset(*QUERIES), 2, shuffle=False)
    assert gap(score(model, in_parts, queries=batches), score(model)) < 1e-8


def test_a_summed_loss_scores_as_a_mean_loss():
    model = classifier()
    expected = score(model)
    model.loss = nn.CrossEntropyLoss(reduction="sum")
    assert gap(score(model, reduction="sum"), expected) < 1e-9


def test_only_the_chosen_layers_count():
    model = classifier()
    exact = dense(model)
    head = slice(-(11 * 3 + 3), None)
    train_gradients = exact.gradients(*DATA[:])[:, head]
    matrix = exact.gauss_newton()[head, head] + DAMPING * torch.eye(36).double()
    query_gradients = exact.gradients(*QUERIES)[:, head]
    expected = query_gradients @ torch.linalg.solve(matrix, train_gradients.mT) / N
    method = FullInfluenceFunction(EXACT.solver, damping=DAMPING, layers=["net.3"])
    assert gap(score(model, method), expected) < 1e-8


def test_curvature_can_be_computed_on_other_data():
    model = classifier()
    part = Subset(DATA, [1, 3, 4, 8])
    exact = dense(model)
    matrix = DenseObjective(model, *DATA[[1, 3, 4, 8]]).gauss_newton()
    expected = exact.scores(matrix, DAMPING, *QUERIES)
    assert gap(score(model, curvature_loader=loader(part, 3)), expected) < 1e-8


@pytest.mark.slow
@pytest.mark.parametrize("solver", [EXACT.solver, Neumann(1e-4), Lanczos(rank=N * 3)], ids=repr)
def test_the_default_damping_is_a_fiftieth_of_the_largest_eigenvalue(solver):
    model = classifier()
    exact = dense(model)
    matrix = exact.gauss_newton()
    damping = float(torch.linalg.eigvalsh(matrix)[-1]) / 50
    expected = exact.scores(matrix, damping, *QUERIES)
    assert gap(score(model, FullInfluenceFunction(solver)), expected) < 1e-4


def test_the_default_damping_of_ekfac_is_a_tenth_of_the_mean_eigenvalue():
    model = Plain(nn.Linear(7, 3)).double()
    damping = 0.1 * float(dense(model).gauss_newton().trace()) / 24
    expected = score(model, FullInfluenceFunction(EKFAC(), damping=damping))
    assert gap(score(model, FullInfluenceFunction(EKFAC())), expected) < 1e-9


@pytest.mark.parametrize("solver", [Woodbury(), ConjugateGradient(), EKFAC()], ids=repr)
def test_scores_do_not_depend_on_the_random_state(solver):
    method = FullInfluenceFunction(solver)
    model = Plain(nn.Sequential(nn.Linear(7, 5), nn.ReLU(), nn.Linear(5, 3))).double()
    results = []
    for seed in (3, 7):
        torch.manual_seed(seed)
        scores = attribute_by_gradients(
            model, loader(DATA, shuffle=False), QUERIES, method=method, progress=False
        )
        results.append(scores)
    assert results[0].provenance == results[1].provenance
    assert torch.equal(results[0].values, results[1].values)


def test_default_settings_suffice_in_single_precision():
    method = FullInfluenceFunction(ConjugateGradient())
    model = classifier()
    expected = score(model, method, shuffle=False)
    x, y = DATA[:]
    single = score(
        model.float(),
        method,
        TensorDataset(x.float(), y),
        (QUERIES[0].float(), QUERIES[1]),
        shuffle=False,
    )
    assert gap(single.double(), expected) < 1e-3


@pytest.mark.parametrize("solver", [Woodbury(), ConjugateGradient(), Lanczos(3)], ids=repr)
def test_attribution_leaves_model_and_loader_unchanged(solver):
    method = FullInfluenceFunction(solver)
    torch.manual_seed(3)
    layers = (nn.Linear(7, 5), nn.BatchNorm1d(5), nn.ReLU(inplace=True), nn.Dropout())
    model = Plain(nn.Sequential(*layers, nn.Linear(5, 3))).double().train()
    model.net[3].eval()
    before, random = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    batches = loader(DATA, shuffle=False)
    sampler = batches.batch_sampler
    attribute_by_gradients(model, batches, QUERIES, method=method, progress=False)
    assert batches.batch_sampler is sampler
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert [m.training for m in model.net] == [True, True, True, False, True]
    assert torch.equal(torch.get_rng_state(), random)
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    assert not any(hooks)


def test_dropout_and_batch_norm_are_in_evaluation_mode():
    torch.manual_seed(3)
    net = nn.Sequential(nn.Linear(7, 5), nn.BatchNorm1d(5), nn.Dropout(), nn.Linear(5, 3))
    model = Plain(net).double().train()
    actual = score(model)
    exact = dense(model)
    assert gap(actual, exact.scores(exact.gauss_newton(), DAMPING, *QUERIES)) < 1e-8


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (FullInfluenceFunction(SHORT), "did not converge"),
        (
            FullInfluenceFunction(ConjugateGradient(products=50), Hessian(), 1e-3),
            "Increase `damping`.*GaussNewton",
        ),
        (FullInfluenceFunction(Lanczos(99), Hessian(), damping=1e-3), "has an eigenvalue of -"),
        (FullInfluenceFunction(EKFAC()), r"`net.2.weight` belongs to another.*layers"),
        (FullInfluenceFunction(EKFAC(), Hessian()), r"got `Hessian\(\)`"),
        (FullInfluenceFunction(layers=["net.7"]), "`net.7`, which matches no layer"),
    ],
    ids=["products", "indefinite", "eigenvalue", "norm", "hessian", "layer"],
)
def test_unsuitable_methods_are_refused(method, message):
    with pytest.raises(ValueError, match=message):
        score(classifier(), method)


def test_repeated_samples_and_empty_loaders_are_refused():
    model, sampler = classifier(), WeightedRandomSampler([1.0] + [0.0] * 10, 11)
    twice = loader(DATA, shuffle=False, sampler=sampler)
    with pytest.raises(ValueError, match="draws sample 0 11 times"):
        attribute_by_gradients(model, twice, QUERIES, method=EXACT, progress=False)
    empty = loader(Subset(DATA, []), shuffle=False)
    with pytest.raises(ValueError, match="`train_loader` is an empty loader"):
        attribute_by_gradients(model, empty, QUERIES, method=EXACT, progress=False)
    with pytest.raises(ValueError, match="`train_loader` is an empty loader"):
        score(model, data=Subset(DATA, []), shuffle=False, curvature_loader=loader(DATA))


def test_a_parameter_without_effect_can_be_left_out():
    plain, model = Plain(nn.Linear(7, 3)).double(), Plain(nn.Linear(7, 3)).double()
    model.net.load_state_dict(plain.net.state_dict())
    model.idle = nn.Parameter(torch.zeros(2).double())
    method = FullInfluenceFunction(EXACT.solver, damping=DAMPING, layers=["net"])
    chosen = score(model, method)
    everything = score(plain, FullInfluenceFunction(EXACT.solver, damping=DAMPING))
    assert gap(chosen, everything) < 1e-9


def test_a_parameter_without_effect_is_named():
    class HasUnused(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = nn.Linear(7, 3), nn.Linear(5, 2)

        def forward(self, x):
            return self.used(x)

    method = FullInfluenceFunction(ConjugateGradient(), damping=DAMPING)
    with pytest.raises(ValueError, match=r"does not depend on `net.unused.weight`, `net.unused.b"):
        attribute_by_gradients(
            Plain(HasUnused()), loader(vectors()), vectors()[:3], method=method, progress=False
        )
