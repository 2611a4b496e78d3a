"""Losses found on the graph: their terms' weights, their curvature, and sampled labels."""

import pytest
import torch
from torch import nn
from torch.autograd.graph import get_gradient_edge
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from tda_lightning.gradients.losses import LossSummary, find_losses, sampled_gradients, term_weights

N, C, T = 5, 3, 7


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def classes(*shape):
    return torch.randint(C, shape, generator=torch.Generator().manual_seed(1))


def chances(*shape):
    return draw(*shape, seed=2).sigmoid()


def losses_of(loss, outputs):
    """The loss functions of a layer's outputs."""
    return find_losses(loss, [get_gradient_edge(outputs)])


def ignoring(outputs):
    labels = classes(N)
    labels[2] = -100
    return functional.cross_entropy(outputs, labels)


# From outputs of a shape to a loss.
LOSSES = {
    "cross-entropy": ((N, C), lambda o: functional.cross_entropy(o, classes(N))),
    "summed": ((N, C), lambda o: functional.cross_entropy(o, classes(N), reduction="sum")),
    "ignoring one": ((N, C), ignoring),
    "class weights": (
        (N, C),
        lambda o: functional.cross_entropy(
            o, classes(N), weight=torch.tensor([0.2, 0.5, 1.7]).double()
        ),
    ),
    "weighted by hand": (
        (N, C),
        lambda o: (functional.cross_entropy(o, classes(N), reduction="none") * chances(N)).mean(),
    ),
    "tokens": ((N, C, T), lambda o: functional.cross_entropy(o, classes(N, T))),
    "tokens in a row": (
        (N, T, C),
        lambda o: functional.cross_entropy(o.reshape(N * T, C), classes(N * T)),
    ),
    "log-softmax and nll": (
        (N, C),
        lambda o: functional.nll_loss(o.log_softmax(-1), classes(N)) / 4,
    ),
    "soft labels": (
        (N, C),
        lambda o: functional.cross_entropy(o, chances(N, C).softmax(dim=1)),
    ),
    "smoothed labels": (
        (N, C),
        lambda o: functional.cross_entropy(o, classes(N), label_smoothing=0.1),
    ),
    "gathered by hand": (
        (N, C),
        lambda o: -o.log_softmax(-1).gather(1, classes(N)[:, None]).mean(),
    ),
    "coins": (
        (N, C),
        lambda o: functional.binary_cross_entropy_with_logits(
            o, (chances(N, C) > 0.5).double(), pos_weight=torch.tensor([1.0, 2.0, 3.0]).double()
        ),
    ),
    "coins of probabilities": (
        (N, C),
        lambda o: functional.binary_cross_entropy(o.sigmoid(), (chances(N, C) > 0.5).double()),
    ),
    "squared error": ((N, C), lambda o: functional.mse_loss(o, draw(N, C, seed=3))),
    "squared by hand": (
        (N, C),
        lambda o: ((o - draw(N, C, seed=3)) ** 2).sum(dim=1).mean() / 2,
    ),
    "huber": ((N, C), lambda o: functional.huber_loss(o, draw(N, C, seed=3), delta=0.7)),
    "smooth L1": ((N, C), lambda o: functional.smooth_l1_loss(o, draw(N, C, seed=3), beta=0.7)),
    "two losses": (
        (N, C),
        lambda o: (
            functional.cross_entropy(o, classes(N))
            + 0.3 * functional.mse_loss(o, draw(N, C, seed=3))
        ),
    ),
}


@pytest.mark.parametrize("name", LOSSES)
def test_sampled_gradients_average_to_the_hessian(name):
    shape, loss_of = LOSSES[name]
    leaf = draw(*shape).requires_grad_()
    outputs = leaf * 1.0
    loss = loss_of(outputs)
    nodes = losses_of(loss, outputs)
    size = outputs.numel()
    hessian = torch.autograd.functional.hessian(loss_of, leaf.detach()).reshape(size, size)
    generator = torch.Generator().manual_seed(0)
    total, draws = torch.zeros(size, size, dtype=torch.float64), 300
    for _ in range(draws):
        pairs = sampled_gradients(loss, nodes, generator)
        edges, grads = zip(*pairs, strict=True)
        (pulled,) = torch.autograd.grad(edges, leaf, grads, retain_graph=True)
        total += torch.outer(pulled.flatten(), pulled.flatten()) / draws
    noise = hessian.diagonal().norm() * size**0.5 / draws**0.5
    assert (total - hessian).norm() < 3 * noise
    diagonal = (total.diagonal() - hessian.diagonal()).norm() / hessian.diagonal().norm()
    assert diagonal < 0.35


@pytest.mark.parametrize("name", LOSSES)
def test_the_weights_of_the_terms_are_those_of_the_loss(name):
    shape, loss_of = LOSSES[name]
    outputs = draw(*shape).requires_grad_() * 1.0
    loss = loss_of(outputs)
    weights = term_weights(loss / 2, losses_of(loss / 2, outputs))
    doubled = term_weights(loss, losses_of(loss, outputs))
    for half, whole in zip(weights, doubled, strict=True):
        torch.testing.assert_close(2 * half, whole)


def test_every_token_weighs_its_share():
    outputs = draw(N, C, T).requires_grad_() * 1.0
    loss = functional.cross_entropy(outputs, classes(N, T))
    (weights,) = term_weights(loss, losses_of(loss, outputs))
    torch.testing.assert_close(weights, torch.full((N, 1, T), 1 / (N * T)).double())


def summary_of(loss, outputs):
    summary = LossSummary(losses_of(loss, outputs), N)
    loss.backward()
    return summary


def test_curvature_is_p_over_its_complement():
    leaf = draw(N, C).requires_grad_()
    outputs = leaf * 1.0
    summary = summary_of(functional.cross_entropy(outputs, classes(N)), outputs)
    p = leaf.detach().softmax(dim=1).gather(1, classes(N)[:, None])[:, 0]
    torch.testing.assert_close(summary.terms(), torch.ones(N).double())
    # Weights of 1/n stand once above and twice below.
    torch.testing.assert_close(summary.spread() / N, p / (1 - p))
    assert summary.loss() == "cross-entropy"


def test_curvature_is_one_over_twice_the_squared_residual():
    leaf = draw(N, 1).requires_grad_()
    outputs = leaf * 1.0
    summary = summary_of(functional.mse_loss(outputs, torch.zeros(N, 1).double()), outputs)
    torch.testing.assert_close(summary.spread() / N, 1 / (2 * leaf.detach()[:, 0] ** 2))
    assert summary.loss() == "squared error"


@pytest.mark.parametrize("in_a_row", [False, True], ids=["own axis", "in a row"])
def test_terms_are_counted_per_sample(in_a_row):
    leaf = draw(N, T, C).requires_grad_()
    labels = classes(N, T)
    labels[1, 2:] = -100
    outputs = (leaf * 1.0).reshape(N * T, C) if in_a_row else (leaf * 1.0).mT
    loss = functional.cross_entropy(outputs, labels.flatten() if in_a_row else labels)
    summary = summary_of(loss, outputs)
    assert summary.terms().round().tolist() == [T, 2, T, T, T]


PENALTIES = {
    "squares": lambda w: (w**2).sum(),
    "squared distances": lambda w: ((w - w.detach() / 2) ** 2).mean(),
    "a squared norm": lambda w: w.norm().pow(2),
    "squared error": lambda w: functional.mse_loss(w, torch.zeros_like(w)),
    "absolute values": lambda w: w.abs().sum(),
    "entropy": lambda w: (w.softmax(1) * w.log_softmax(1)).sum(),
}


@pytest.mark.parametrize("name", PENALTIES)
@pytest.mark.parametrize("weight_shape", [(C, N), (N, C)], ids=["whole", "of as many as samples"])
def test_a_penalty_on_parameters_is_no_loss_of_the_samples(name, weight_shape):
    weight = draw(*weight_shape, seed=4).requires_grad_()

    def summary(strength):
        outputs = draw(N, weight_shape[1]) @ weight.mT
        loss = functional.mse_loss(outputs, torch.zeros_like(outputs))
        loss = loss + strength * PENALTIES[name](weight)
        assert [type(node).__name__ for node in losses_of(loss, outputs)] == ["SquaredLoss"]
        return summary_of(loss, outputs)

    found, expected = summary(0.1), summary(0.0)
    torch.testing.assert_close(found.terms(), expected.terms())
    torch.testing.assert_close(found.spread(), expected.spread())


def test_a_penalty_on_what_a_layer_gives_is_a_loss_of_the_samples():
    hidden = draw(N, C).requires_grad_() * 1.0
    loss = functional.cross_entropy(2 * hidden, classes(N)) + 0.1 * (hidden**2).mean()
    found = {type(node).__name__ for node in losses_of(loss, hidden)}
    assert found == {"SoftmaxLoss", "SquarePower"}


def test_a_loss_inside_of_a_layer_is_found():
    """As in a module that returns each sample's loss, or log-probabilities."""
    weight = draw(C, C, seed=4).requires_grad_()
    log_probabilities = (draw(N, C) @ weight).log_softmax(1)
    losses = functional.nll_loss(log_probabilities, classes(N), reduction="none")
    for outputs in (log_probabilities, losses):
        assert [type(node).__name__ for node in losses_of(losses.mean(), outputs)] == [
            "SoftmaxLoss"
        ]


def test_a_loss_of_layers_that_a_checkpoint_hides_is_found():
    net = nn.Linear(C, C).double()
    outputs = checkpoint(net, draw(N, C).requires_grad_(), use_reentrant=True)
    loss = functional.cross_entropy(outputs, classes(N)) + (net.weight**2).sum()
    assert [type(node).__name__ for node in find_losses(loss, [])] == ["SoftmaxLoss"]


def test_a_loss_that_is_not_known_has_no_summary():
    leaf = draw(N, C).requires_grad_()
    outputs = leaf * 1.0
    loss = outputs.abs().mean()
    assert losses_of(loss, outputs) == []
    summary = summary_of(loss, outputs)
    assert summary.terms() is None
    assert summary.spread() is None
    assert summary.loss() == ""
