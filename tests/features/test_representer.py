"""Representer points: outputs are sums of contributions of the training samples."""

import copy

import pytest
import torch
from lightning_models import Plain, loader, vectors
from torch import nn
from torch.nn.functional import cross_entropy, mse_loss
from torch.utils.data import TensorDataset

from tda_lightning import FeatureSimilarity, RepresenterPoint, attribute_by_features
from tda_lightning.features import LocalJacobianExpansion, representers
from tda_lightning.features.extraction import query_features, train_features

N, CLASSES = 29, 3
QUERIES = slice(29, 34)


def half_squared(outputs, targets):
    return (outputs - targets).square().sum(dim=1).mean() / 2


def network(loss=cross_entropy, bias=True):
    torch.manual_seed(2)
    layers = (nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, CLASSES, bias=bias))
    return Plain(nn.Sequential(*layers), loss=loss).double()


def data(loss=cross_entropy):
    x, y = vectors(N + 5)[:]
    generator = torch.Generator().manual_seed(4)
    y[:7] = torch.randint(CLASSES, (7,), generator=generator)
    if loss is not cross_entropy:
        y = torch.randn(N + 5, CLASSES, generator=generator, dtype=torch.float64)
    return TensorDataset(x.double(), y)


def train_loader(loss=cross_entropy):
    return loader(torch.utils.data.Subset(data(loss), range(N)))


def refitted(model, decomposition):
    """Return a copy of the model with the refitted last layer."""
    copied = copy.deepcopy(model)
    weight = decomposition.weight
    with torch.no_grad():
        if copied.net[2].bias is not None:
            copied.net[2].bias.copy_(weight[:, -1])
            weight = weight[:, :-1]
        copied.net[2].weight.copy_(weight)
    return copied


each_loss = pytest.mark.parametrize("loss", [cross_entropy, mse_loss, half_squared])


@each_loss
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("targets", ["labels", "predictions"])
def test_the_decomposition_reproduces_the_logits(loss, bias, targets):
    model = network(loss, bias)
    method = RepresenterPoint(targets=targets)
    decomposition = representers(model, train_loader(loss), method=method, progress=False)
    queries = query_features(model, data(loss)[QUERIES], progress=False, reads="head")
    logits = refitted(model, decomposition).net(data(loss)[QUERIES][0]).detach()
    torch.testing.assert_close(decomposition.outputs(queries), logits, atol=1e-4, rtol=0)
    torch.testing.assert_close(
        decomposition.contributions(queries).sum(dim=1), decomposition.outputs(queries)
    )


@each_loss
@pytest.mark.parametrize("lam", [1e-6, 0.02])
def test_the_refit_is_a_stationary_point_of_the_models_own_loss(loss, lam):
    model = network(loss)
    method = RepresenterPoint(regularization=lam)
    decomposition = representers(model, train_loader(loss), method=method, progress=False)
    refitted_model = refitted(model, decomposition)
    last = list(refitted_model.net[2].parameters())
    x, y = data(loss)[:N]
    value = loss(refitted_model.net(x), y) + lam * sum(p.square().sum() for p in last)
    for gradient in torch.autograd.grad(value, last):
        assert gradient.abs().max() < 1e-9


def test_representer_values_are_their_equation():
    model, lam = network(), 0.01
    method = RepresenterPoint(regularization=lam)
    decomposition = representers(model, train_loader(), method=method, progress=False)
    x, y = data()[:N]
    refitted_model = refitted(model, decomposition)
    outputs = refitted_model.net(x).detach().requires_grad_()
    (gradients,) = torch.autograd.grad(cross_entropy(outputs, y, reduction="sum"), outputs)
    torch.testing.assert_close(
        decomposition.values, -gradients / (2 * lam * N), atol=1e-6, rtol=1e-6
    )
    torch.testing.assert_close(decomposition.importance().values, decomposition.values.norm(dim=1))
    assert decomposition.train_ids.tolist() == list(range(N))


@pytest.mark.parametrize("output", ["label", "prediction", 1, "loss"])
def test_scores_are_contributions_to_the_chosen_output(output):
    model = network()
    batch = data()[QUERIES]
    method = RepresenterPoint(output=output)
    scores = attribute_by_features(model, train_loader(), batch, method=method, progress=False)
    decomposition = representers(model, train_loader(), progress=False)
    logits = model.net(batch[0]).detach()
    directions = {
        "label": torch.eye(3)[batch[1]],
        "prediction": torch.eye(3)[logits.argmax(dim=1)],
        1: torch.eye(3)[[1] * 5],
        "loss": torch.eye(3)[batch[1]] - logits.softmax(dim=1),
    }
    contributions = decomposition.contributions(
        query_features(model, batch, progress=False, reads="head")
    )
    expected = (contributions * directions[output][:, None].double()).sum(dim=2)
    torch.testing.assert_close(scores.values, expected, atol=1e-6, rtol=1e-6)
    assert scores.train_ids.tolist() == list(range(N))


def test_samples_raise_the_output_of_their_class_and_lower_the_others():
    decomposition = representers(network(), train_loader(), progress=False)
    labels = data()[:N][1]
    for label in range(CLASSES):
        of_class = labels == label
        assert (decomposition.values[of_class, label] > 0).all()
        assert (decomposition.values[~of_class, label] < 0).all()


def test_a_second_refit_does_not_change_the_weight():
    model = network()
    first = representers(model, train_loader(), progress=False)
    refitted_model = refitted(model, first)
    second = representers(refitted_model, train_loader(), progress=False)
    torch.testing.assert_close(second.weight, first.weight, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("method", [RepresenterPoint(), LocalJacobianExpansion()], ids=repr)
def test_permuting_training_samples_permutes_scores(method):
    model, order = network(), torch.randperm(N, generator=torch.Generator().manual_seed(0))
    x, y = data()[:N]
    permuted = loader(TensorDataset(x[order], y[order]))

    def scores_of(train):
        batch = data()[QUERIES]
        return attribute_by_features(model, train, batch, method=method, progress=False).values

    torch.testing.assert_close(
        scores_of(permuted), scores_of(train_loader())[:, order], atol=1e-5, rtol=1e-4
    )


def test_an_expansion_of_a_squared_loss_reproduces_the_outputs():
    model = network(half_squared, bias=False)
    x, y = data(half_squared)[:N]
    with torch.no_grad():
        model.net[2].weight.copy_(torch.linalg.lstsq(model.net[:2](x), y).solution.mT)
    batch = data(half_squared)[QUERIES]
    outputs = model.net(batch[0]).detach()
    for output in range(CLASSES):
        method = LocalJacobianExpansion(output=output, ascent=0.7, damping=0.0)
        scores = attribute_by_features(
            model, train_loader(half_squared), batch, method=method, progress=False
        )
        torch.testing.assert_close(scores.values.sum(dim=1), outputs[:, output])


def test_an_expansion_of_a_cross_entropy_reproduces_the_logits_where_they_are_stationary():
    model = network(bias=False)
    method = RepresenterPoint(regularization=1e-6)
    model = refitted(model, representers(model, train_loader(), method=method, progress=False))
    batch = data()[QUERIES]
    logits = model.net(batch[0]).detach()
    logits = logits - logits.mean(dim=1, keepdim=True)
    score_sums = [
        attribute_by_features(
            model,
            train_loader(),
            batch,
            method=LocalJacobianExpansion(output=output, damping=1e-9),
            progress=False,
        ).values.sum(dim=1)
        for output in range(CLASSES)
    ]
    sums = torch.stack(score_sums, dim=1)
    sums = sums - sums.mean(dim=1, keepdim=True)
    torch.testing.assert_close(sums, logits, atol=2e-3, rtol=2e-3)


def gradient(function, at):
    return torch.autograd.functional.jacobian(function, at)


def test_an_expansion_is_its_equation():
    model, batch = network(bias=False), data()[QUERIES]
    x, y = data()[:N]
    features, phi = model.net[:2](x).detach(), model.net[:2](batch[0]).detach()

    def mean_loss(flat):
        return cross_entropy(features @ flat.view(3, 5).mT, y)

    start = model.net[2].weight.detach().flatten()
    weight = start + 0.01 * gradient(mean_loss, start)
    hessian = torch.autograd.functional.hessian(mean_loss, weight)
    damped = hessian + 1e-3 * hessian.diagonal().mean() * torch.eye(15, dtype=torch.float64)
    method = LocalJacobianExpansion()
    scores = attribute_by_features(model, train_loader(), batch, method=method, progress=False)
    for i in (0, 4, 28):

        def own_loss(flat, i=i):
            return cross_entropy(features[i] @ flat.view(3, 5).mT, y[i])

        sample_gradient = gradient(own_loss, weight)
        theta = (weight - torch.linalg.solve(damped, sample_gradient)).view(3, 5) / N
        expected = (phi @ theta.mT)[torch.arange(5), batch[1]]
        torch.testing.assert_close(scores.values[:, i], expected)


@pytest.mark.parametrize(
    "loss",
    [
        nn.functional.l1_loss,
        lambda outputs, labels: cross_entropy(outputs, labels, reduction="sum"),
        lambda outputs, labels: cross_entropy(3 * outputs, labels),
    ],
    ids=["absolute", "sum", "temperature"],
)
def test_other_losses_raise(loss):
    kind = mse_loss if loss is nn.functional.l1_loss else cross_entropy
    model = network(loss)
    with pytest.raises(
        ValueError, match="Expected the unweighted mean over the batch of a softmax"
    ):
        representers(model, train_loader(kind), progress=False)


def test_outputs_that_do_not_exist_raise():
    for output, message in (
        (3, "`output` is 3, but there are 3 outputs"),
        ("label", "has no label"),
    ):
        loss = mse_loss if output == "label" else cross_entropy
        method = RepresenterPoint(output=output)
        with pytest.raises(ValueError, match=message):
            attribute_by_features(
                network(loss), train_loader(loss), data(loss)[:3], method=method, progress=False
            )


def test_features_without_head_outputs_raise():
    layer_features = train_features(network(), train_loader(), progress=False)
    with pytest.raises(ValueError, match="come without outputs and gradients"):
        RepresenterPoint().fit(layer_features)
    assert FeatureSimilarity().attribute(layer_features, layer_features).values.shape == (N, N)
