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
    """Return a run of two epochs in which sample 10 is never drawn, and the weights in it."""
    generator = torch.Generator().manual_seed(seed)
    weights = torch.randn(D, CLASSES, generator=generator, dtype=torch.float64)
    x, y = data()
    store, visited = MemoryStore(), {}
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
        visited.update({int(i): (one, own) for i, one, own in zip(ids, p, g, strict=True)})
        weights = weights - 0.1 * g.mean(dim=0).view_as(weights)
    return store, weights, visited


def queries(weights, seed=1):
    return gradients(weights, *data(seed, N_QUERY))


def reference(visited, q, damping):
    """Return the two factors of eq. 17: the part up to the features, and the doubts."""
    p = torch.stack([visited[i][0] for i in range(10)])
    features = torch.stack([visited[i][1] / (1 - visited[i][0]) for i in range(10)])
    gram = features.mT @ features
    gram = gram + damping * gram.diagonal().mean() * torch.eye(K).double()
    return q @ torch.linalg.inv(gram) @ features.mT, 1 - p


@pytest.mark.parametrize("damping", [0.01, 0.1, 3.0])
def test_it_is_its_formula(damping):
    run, weights, visited = train(0)
    part, doubts = reference(visited, queries(weights), damping)
    found = TRAK(damping).attribute(run, queries(weights), progress=False).values
    torch.testing.assert_close(found[:, :10], part * doubts)
    assert found[:, 10].abs().max() == 0


def test_an_ensemble_averages_the_parts_by_themselves():
    trained = [train(seed) for seed in (0, 1, 2)]
    rows = [queries(weights) for _, weights, _ in trained]
    parts = [reference(v, q, 1.0) for (_, _, v), q in zip(trained, rows, strict=True)]
    expected = sum(part for part, _ in parts) / 3 * sum(doubts for _, doubts in parts) / 3
    runs = [run for run, _, _ in trained]
    found = TRAK().attribute_ensemble(runs, rows, progress=False)
    torch.testing.assert_close(found.values[:, :10], expected)
    assert found.provenance["mean"] == "of 3"


def test_a_sample_that_was_fitted_to_rounding_leaves_no_doubt():
    (run, weights, visited), (later, *_) = train(0), train(1)
    sure = MemoryStore()
    sure.begin(later.recipe)
    for step in later:
        fitted = step.sample_ids == 4
        curvature = torch.where(fitted, 0.0, step.curvature)  # as it is recorded without gradient
        rows = torch.where(fitted[:, None], 0.0, step.sketch)
        sure.append(replace(step, sketch=rows, curvature=curvature))
    rows = [queries(weights), queries(weights)]
    part, doubts = reference(visited, rows[0], 1.0)
    found = TRAK().attribute_ensemble([run, sure], rows, progress=False).values
    torch.testing.assert_close(found[:, 4], part[:, 4] / 2 * doubts[4] / 2)


def test_an_ensemble_of_one_is_that_one():
    run, weights, _ = train(0)
    rows = queries(weights)
    alone = TRAK().attribute(run, rows, progress=False)
    together = TRAK().attribute_ensemble([run], [rows], progress=False)
    torch.testing.assert_close(together.values, alone.values)


def test_it_is_linear_in_the_query():
    run, weights, _ = train(0)
    one, other = queries(weights, 1), queries(weights, 2)

    def scores(q):
        return TRAK().attribute(run, q, progress=False).values

    torch.testing.assert_close(scores(2 * one - other), 2 * scores(one) - scores(other))


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
