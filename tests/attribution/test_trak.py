"""TRAK against its formula, on a logistic regression with many classes."""

from dataclasses import replace

import pytest
import torch
from lightning_models import Plain, loader, mlp, quiet_trainer, vectors
from torch.func import grad, vmap
from torch.nn.functional import cross_entropy, mse_loss
from torch.utils.data import TensorDataset

from tda_lightning import TRAK, GradientRecorder, attribute
from tda_lightning.stores import MemoryStore, Step
from tda_lightning.stores.recipe import Recipe
from tda_lightning.stores.step import ParameterGroup

N_TRAIN, D, CLASSES, N_QUERY = 11, 3, 5, 3
K = D * CLASSES


def loss(weights, x, y):
    return cross_entropy(x @ weights, y)


def data(seed=0, n=N_TRAIN):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, D, generator=generator, dtype=torch.float64)
    return x, torch.randint(CLASSES, (n,), generator=generator)


def gradients(weights, x, y):
    return vmap(grad(loss), in_dims=(None, 0, 0))(weights, x, y).flatten(1)


def train(seed):
    """Return a run of two epochs that never draws sample 10, and its final weights and last visits.

    Last visits are pairs of the label's probability and the gradient, by sample.
    """
    generator = torch.Generator().manual_seed(seed)
    weights = torch.randn(D, CLASSES, generator=generator, dtype=torch.float64)
    x, y = data()
    store, last_visits = MemoryStore(), {}
    store.begin(Recipe((), (), {"name": "Identity"}, K, "float64", train_ids=((0, N_TRAIN),)))
    for index, ids in enumerate([*torch.randperm(10, generator=generator).split(5)] * 2):
        p = (x[ids] @ weights).softmax(dim=1).gather(1, y[ids, None])[:, 0]
        g = gradients(weights, x[ids], y[ids])
        share = torch.full((5,), 0.2, dtype=torch.float64)
        group = ParameterGroup(lr=0.1)
        step = Step(
            index=index,
            epoch=index // 2,
            optimizer="SGD",
            groups=(group,),
            sample_ids=ids,
            weights=share,
            sketch=g / 5,
            curvature=p / (1 - p),
        )
        store.append(step)
        last_visits.update(zip(ids.tolist(), zip(p, g, strict=True), strict=True))
        weights = weights - 0.1 * g.mean(dim=0).view_as(weights)
    return store, weights, last_visits


def queries(weights, seed=1):
    return gradients(weights, *data(seed, N_QUERY))


def reference(last_visits, q, damping):
    """Return the two factors of eq. 17: the part up to the features, and 1 - p."""
    p, g = (torch.stack(parts) for parts in zip(*map(last_visits.get, range(10)), strict=True))
    phi = g / (1 - p)[:, None]
    gram = phi.mT @ phi
    gram = gram + damping * gram.diagonal().mean() * torch.eye(K).double()
    return q @ torch.linalg.inv(gram) @ phi.mT, 1 - p


@pytest.mark.parametrize("damping", [0.01, 0.1, 3.0])
def test_it_matches_its_equation(damping):
    run, weights, last_visits = train(0)
    part, one_minus_p = reference(last_visits, queries(weights), damping)
    values = TRAK(damping).attribute(run, queries(weights), progress=False).values
    torch.testing.assert_close(values[:, :10], part * one_minus_p)
    assert values[:, 10].abs().max() == 0


def test_an_ensemble_averages_the_two_factors_separately():
    trained = [train(seed) for seed in (0, 1, 2)]
    rows = [queries(weights) for _, weights, _ in trained]
    parts = [reference(v, q, 1.0) for (_, _, v), q in zip(trained, rows, strict=True)]
    expected = sum(part for part, _ in parts) / 3 * sum(one_minus_p for _, one_minus_p in parts) / 3
    runs = [run for run, _, _ in trained]
    scores = TRAK().attribute_ensemble(runs, rows, progress=False)
    torch.testing.assert_close(scores.values[:, :10], expected)
    assert scores.provenance["mean"] == "of 3"


def test_a_sample_that_is_fitted_exactly_has_a_factor_of_zero():
    (run, weights, last_visits), (later, *_) = train(0), train(1)
    fitted_run = MemoryStore()
    fitted_run.begin(later.recipe)
    for step in later:
        is_fitted = step.sample_ids == 4
        curvature = torch.where(is_fitted, 0.0, step.curvature)  # recorded if there is no gradient
        rows = torch.where(is_fitted[:, None], 0.0, step.sketch)
        fitted_run.append(replace(step, sketch=rows, curvature=curvature))
    rows = [queries(weights), queries(weights)]
    part, one_minus_p = reference(last_visits, rows[0], 1.0)
    values = TRAK().attribute_ensemble([run, fitted_run], rows, progress=False).values
    torch.testing.assert_close(values[:, 4], part[:, 4] / 2 * one_minus_p[4] / 2)


def test_an_ensemble_of_one_run_equals_the_run():
    run, weights, _ = train(0)
    rows = queries(weights)
    single = TRAK().attribute(run, rows, progress=False)
    ensemble = TRAK().attribute_ensemble([run], [rows], progress=False)
    torch.testing.assert_close(ensemble.values, single.values)


def test_scores_are_linear_in_the_query():
    run, weights, _ = train(0)
    q1, q2 = queries(weights, 1), queries(weights, 2)

    def scores(q):
        return TRAK().attribute(run, q, progress=False).values

    torch.testing.assert_close(scores(2 * q1 - q2), 2 * scores(q1) - scores(q2))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"curvature": None}, "expected loss curvatures in every step"),
        ({"loss": "squared error"}, "cross-entropy of classes.*step 3 is squared error"),
        ({"terms": torch.full((5,), 7.0).double()}, "one label per sample.*a sample with 7"),
    ],
    ids=["unknown", "regression", "sequences"],
)
def test_other_losses_are_refused(change, message):
    run, weights, _ = train(0)
    other = MemoryStore()
    other.begin(run.recipe)
    for step in run:
        other.append(replace(step, **change))
    with pytest.raises(ValueError, match=message):
        TRAK().attribute(other, queries(weights), progress=False)


def test_a_recorded_regression_is_refused_and_a_classification_is_not():
    inputs, labels = vectors().tensors
    for loss, targets in ((cross_entropy, labels), (mse_loss, torch.randn(13, 3))):
        run, model, data = MemoryStore(), Plain(mlp(), loss), TensorDataset(inputs, targets)
        quiet_trainer(GradientRecorder(run)).fit(model, loader(data))
        if loss is cross_entropy:
            assert attribute(run, model, data[:3], method=TRAK(), progress=False).values.any()
        else:
            with pytest.raises(ValueError, match=r"the loss of step \d is squared error"):
                attribute(run, model, data[:3], method=TRAK(), progress=False)
