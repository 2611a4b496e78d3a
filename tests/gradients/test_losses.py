"""Losses found on the autograd graph: weights of terms, curvature, and sampled labels."""

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from tda_lightning.gradients.losses import (
    find_losses,
    loss_nodes,
    sampled_gradients,
    term_weights,
)
from tda_lightning.gradients.losses.deferred_summary import DeferredSummary
from tda_lightning.gradients.losses.deferred_summary import facts_of as facts_of_all
from tda_lightning.gradients.losses.loss_graph import LossSummary

N, C, T = 5, 3, 7


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def classes(*shape):
    return torch.randint(C, shape, generator=torch.Generator().manual_seed(1))


def probabilities(*shape):
    return draw(*shape, seed=2).sigmoid()


def losses_of(loss, outputs):
    """Return the loss functions that depend on a layer's outputs."""
    return find_losses(loss, nodes_between(loss.grad_fn, outputs.grad_fn))


def nodes_between(root, target):
    """Return the nodes through which a loss depends on a tensor."""
    if root is target:
        return {root}
    parts = [nodes_between(child, target) for child, _ in root.next_functions if child is not None]
    return set().union(*parts, {root} if any(parts) else set())


def cross_entropy_ignoring_a_label(outputs):
    labels = classes(N)
    labels[2] = -100
    return functional.cross_entropy(outputs, labels)


# Shape of the outputs, and the loss as a function of them.
LOSSES = {
    "cross-entropy": ((N, C), lambda o: functional.cross_entropy(o, classes(N))),
    "summed": ((N, C), lambda o: functional.cross_entropy(o, classes(N), reduction="sum")),
    "ignored label": ((N, C), cross_entropy_ignoring_a_label),
    "class weights": (
        (N, C),
        lambda o: functional.cross_entropy(
            o, classes(N), weight=torch.tensor([0.2, 0.5, 1.7]).double()
        ),
    ),
    "weighted by hand": (
        (N, C),
        lambda o: (
            functional.cross_entropy(o, classes(N), reduction="none") * probabilities(N)
        ).mean(),
    ),
    "tokens": ((N, C, T), lambda o: functional.cross_entropy(o, classes(N, T))),
    "flattened tokens": (
        (N, T, C),
        lambda o: functional.cross_entropy(o.reshape(N * T, C), classes(N * T)),
    ),
    "log-softmax and nll": (
        (N, C),
        lambda o: functional.nll_loss(o.log_softmax(-1), classes(N)) / 4,
    ),
    "soft labels": (
        (N, C),
        lambda o: functional.cross_entropy(o, probabilities(N, C).softmax(dim=1)),
    ),
    "smoothed labels": (
        (N, C),
        lambda o: functional.cross_entropy(o, classes(N), label_smoothing=0.1),
    ),
    "gathered by hand": (
        (N, C),
        lambda o: -o.log_softmax(-1).gather(1, classes(N)[:, None]).mean(),
    ),
    "binary cross-entropy of logits": (
        (N, C),
        lambda o: functional.binary_cross_entropy_with_logits(
            o,
            (probabilities(N, C) > 0.5).double(),
            pos_weight=torch.tensor([1.0, 2.0, 3.0]).double(),
        ),
    ),
    "binary cross-entropy": (
        (N, C),
        lambda o: functional.binary_cross_entropy(
            o.sigmoid(), (probabilities(N, C) > 0.5).double()
        ),
    ),
    "soft labels of two classes": (
        (N, 2),
        lambda o: functional.cross_entropy(o, probabilities(N, 2).softmax(dim=1)),
    ),
    "soft binary labels": (
        (N, C),
        lambda o: functional.binary_cross_entropy_with_logits(o, probabilities(N, C)),
    ),
    "soft binary labels of probabilities": (
        (N, C),
        lambda o: functional.binary_cross_entropy(o.sigmoid(), probabilities(N, C)),
    ),
    "smoothed labels of tokens": (
        (N, C, T),
        lambda o: functional.cross_entropy(o, classes(N, T), label_smoothing=0.1),
    ),
    "squared error": ((N, C), lambda o: functional.mse_loss(o, draw(N, C, seed=3))),
    "squared difference": (
        (N, C),
        lambda o: ((o - draw(N, C, seed=3)) ** 2).sum(dim=1).mean() / 2,
    ),
    "huber": ((N, C), lambda o: functional.huber_loss(o, draw(N, C, seed=3), delta=0.7)),
    "smooth L1": ((N, C), lambda o: functional.smooth_l1_loss(o, draw(N, C, seed=3), beta=0.7)),
    "squared error of swapped arguments": (
        (N, C),
        lambda o: functional.mse_loss(draw(N, C, seed=3), o),
    ),
    "swapped huber": (
        (N, C),
        lambda o: functional.huber_loss(draw(N, C, seed=3), o, delta=0.7),
    ),
    "swapped smooth L1": (
        (N, C),
        lambda o: functional.smooth_l1_loss(draw(N, C, seed=3), o, beta=0.7),
    ),
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
    total, n_draws = torch.zeros(size, size, dtype=torch.float64), 300
    for _ in range(n_draws):
        pairs = sampled_gradients(loss, nodes, generator)
        edges, grads = zip(*pairs, strict=True)
        (pulled,) = torch.autograd.grad(edges, leaf, grads, retain_graph=True)
        total += torch.outer(pulled.flatten(), pulled.flatten()) / n_draws
    noise = hessian.diagonal().norm() * size**0.5 / n_draws**0.5
    assert (total - hessian).norm() < 3 * noise
    diagonal_error = (total.diagonal() - hessian.diagonal()).norm() / hessian.diagonal().norm()
    assert diagonal_error < 0.35


@pytest.mark.parametrize("name", LOSSES)
def test_weights_of_terms_are_linear_in_the_loss(name):
    shape, loss_of = LOSSES[name]
    outputs = draw(*shape).requires_grad_() * 1.0
    loss = loss_of(outputs)
    half_weights = term_weights(loss / 2, losses_of(loss / 2, outputs))
    whole_weights = term_weights(loss, losses_of(loss, outputs))
    for half, whole in zip(half_weights, whole_weights, strict=True):
        torch.testing.assert_close(2 * half, whole)


def test_every_token_has_the_same_weight():
    outputs = draw(N, C, T).requires_grad_() * 1.0
    loss = functional.cross_entropy(outputs, classes(N, T))
    (weights,) = term_weights(loss, losses_of(loss, outputs))
    torch.testing.assert_close(weights, torch.full((N, 1, T), 1 / (N * T)).double())


def facts_of(loss, outputs, value=None):
    summary = LossSummary(losses_of(loss, outputs), N, value=value)
    loss.backward(retain_graph=True)
    return summary.facts()


@pytest.mark.parametrize("name", LOSSES)
def test_facts_of_batches_together_are_those_of_each(name):
    """Also of batches whose losses cannot be joined, since they have other classes or terms."""
    shape, loss_of = LOSSES[name]
    summaries, expected = [], []
    for seed in range(3):
        outputs = draw(*shape, seed=seed).requires_grad_() * 1.0
        other = draw(N, C + seed, seed=seed).requires_grad_() * 1.0
        for batch, loss in (
            (outputs, loss_of(outputs)),
            (other, other.log_softmax(-1)[:, 0].sum()),
        ):
            summaries.append(DeferredSummary(losses_of(loss, batch), N))
            expected.append(facts_of(loss, batch))
    for one, other in zip(facts_of_all(summaries), expected, strict=True):
        for field in ("terms", "spread", "full_spread", "losses", "errors", "margins"):
            value = getattr(other, field)
            torch.testing.assert_close(getattr(one, field), value, equal_nan=True)


@pytest.mark.parametrize("name", LOSSES)
def test_losses_of_samples_sum_to_the_loss_of_the_batch(name):
    shape, loss_of = LOSSES[name]
    outputs = draw(*shape).requires_grad_() * 1.0
    loss = loss_of(outputs)
    nodes = losses_of(loss, outputs)
    losses = facts_of(loss, outputs).losses
    weights = [w.reshape(N, -1).sum(dim=1) for w in term_weights(loss, nodes)]
    torch.testing.assert_close(torch.stack(weights).sum(dim=0) @ losses.nan_to_num(0), loss)


@pytest.mark.parametrize("name", ["cross-entropy", "summed", "class weights", "gathered by hand"])
def test_errors_and_margins_are_those_of_the_predicted_classes(name):
    shape, loss_of = LOSSES[name]
    leaf = (3 * draw(*shape)).requires_grad_()
    outputs = leaf * 1.0
    facts = facts_of(loss_of(outputs), outputs)
    for i, label in enumerate(classes(N).tolist()):
        logits = leaf[i].detach()
        error = logits.softmax(0) - functional.one_hot(torch.tensor(label), C)
        others = torch.cat([logits[:label], logits[label + 1 :]])
        assert facts.errors[i].item() == pytest.approx(error.norm().item())
        assert facts.margins[i].item() == pytest.approx((logits[label] - others.max()).item())


@pytest.mark.parametrize("are_logits", [True, False], ids=["logits", "probabilities"])
def test_a_binary_cross_entropy_is_a_cross_entropy_of_two_classes(are_logits):
    targets = (probabilities(N) > 0.5).double()
    leaf = draw(N).requires_grad_()
    outputs = leaf * 1.0
    if are_logits:
        loss = functional.binary_cross_entropy_with_logits(outputs, targets)
    else:
        loss = functional.binary_cross_entropy(outputs.sigmoid(), targets)
    binary = facts_of(loss, outputs)
    outputs = torch.stack([torch.zeros(N), leaf], dim=1)
    softmax = facts_of(functional.cross_entropy(outputs, targets.long()), outputs)
    for name in ("losses", "errors", "margins"):
        torch.testing.assert_close(getattr(binary, name), getattr(softmax, name))


def test_a_confidently_wrong_prediction_has_its_full_loss():
    outputs = torch.tensor([[40.0, 0.0, -torch.inf]] * N).requires_grad_() * 1.0
    facts = facts_of(functional.cross_entropy(outputs, torch.ones(N).long()), outputs)
    torch.testing.assert_close(facts.losses, torch.full((N,), 40.0))
    torch.testing.assert_close(facts.margins, torch.full((N,), -40.0))


def test_an_ignored_sample_has_no_loss():
    outputs = draw(N, C).requires_grad_() * 1.0
    facts = facts_of(cross_entropy_ignoring_a_label(outputs), outputs)
    for values in (facts.losses, facts.errors, facts.margins):
        assert values.isnan().tolist() == [i == 2 for i in range(N)]


def test_samples_of_several_terms_have_a_mean_loss_and_no_margin():
    outputs = draw(N, C, T).requires_grad_() * 1.0
    facts = facts_of(functional.cross_entropy(outputs, classes(N, T)), outputs)
    losses = functional.cross_entropy(outputs, classes(N, T), reduction="none").mean(dim=1)
    torch.testing.assert_close(facts.losses, losses.detach())
    assert facts.errors is None
    assert facts.margins is None


@pytest.mark.parametrize(
    ("loss_of", "name"),
    [
        (lambda x: functional.cross_entropy(x, classes(N)), "cross-entropy"),
        (lambda x: functional.mse_loss(x, torch.zeros(N, C).double()), "squared error"),
        (lambda x: x.abs().mean(), ""),
    ],
    ids=["cross-entropy", "squared error", "absolute error"],
)
def test_losses_have_names(loss_of, name):
    outputs = draw(N, C).requires_grad_() * 1.0
    assert LossSummary(losses_of(loss_of(outputs), outputs), N).name == name


def test_spread_of_cross_entropy_is_p_over_its_complement():
    leaf = draw(N, C).requires_grad_()
    outputs = leaf * 1.0
    facts = facts_of(functional.cross_entropy(outputs, classes(N)), outputs)
    p = leaf.detach().softmax(dim=1).gather(1, classes(N)[:, None])[:, 0]
    torch.testing.assert_close(facts.terms, torch.ones(N).double())
    # The trace has one factor of 1/n, and the squared gradient has two.
    torch.testing.assert_close(facts.spread / N, p / (1 - p))


def test_spread_of_squared_error_is_one_over_twice_the_squared_residual():
    leaf = draw(N, 1).requires_grad_()
    outputs = leaf * 1.0
    facts = facts_of(functional.mse_loss(outputs, torch.zeros(N, 1).double()), outputs)
    torch.testing.assert_close(facts.spread / N, 1 / (2 * leaf.detach()[:, 0] ** 2))


@pytest.mark.parametrize("name", [name for name in LOSSES if name != "two losses"])
def test_the_full_spread_is_the_trace_of_the_hessian_over_the_squared_gradient(name):
    shape, loss_of = LOSSES[name]
    leaf = draw(*shape).requires_grad_()
    outputs = leaf * 1.0
    facts = facts_of(loss_of(outputs), outputs)
    size = leaf.numel()
    hessian = torch.autograd.functional.hessian(loss_of, leaf.detach()).reshape(size, size)
    traces = hessian.diagonal().reshape(N, -1).sum(dim=1)
    squares = leaf.grad.reshape(N, -1).square().sum(dim=1)
    expected = torch.where(squares > 0, traces / squares, 0)
    torch.testing.assert_close(facts.full_spread, expected)


def test_the_full_spread_of_a_large_vocabulary_is_exact_for_hard_labels(monkeypatch):
    leaf = (3 * draw(N, T, C)).requires_grad_()
    labels = classes(N, T).flatten()
    outputs = leaf * 1.0
    of_small = facts_of(functional.cross_entropy(outputs.reshape(-1, C), labels), outputs)
    monkeypatch.setattr(loss_nodes, "_MAX_PROBABILITIES", 1)
    of_large = facts_of(functional.cross_entropy(outputs.reshape(-1, C), labels), outputs)
    torch.testing.assert_close(of_large.full_spread, of_small.full_spread)


@pytest.mark.parametrize("name", ["two classes", "binary cross-entropy", "one output"])
def test_with_one_output_or_two_classes_both_spreads_are_the_same_numbers(name):
    labels = (probabilities(N) > 0.5).long()
    loss_of = {
        "two classes": lambda o: functional.cross_entropy(o, labels),
        "binary cross-entropy": lambda o: functional.binary_cross_entropy_with_logits(
            o[:, 0], labels.double()
        ),
        "one output": lambda o: functional.mse_loss(o[:, 0], labels.double()),
    }[name]
    outputs = draw(N, 2).requires_grad_() * 1.0
    facts = facts_of(loss_of(outputs), outputs)
    assert torch.equal(facts.spread, facts.full_spread)


@pytest.mark.parametrize("flattened", [False, True], ids=["sample axis", "flattened"])
def test_terms_are_counted_per_sample(flattened):
    leaf = draw(N, T, C).requires_grad_()
    labels = classes(N, T)
    labels[1, 2:] = -100
    outputs = (leaf * 1.0).reshape(N * T, C) if flattened else (leaf * 1.0).mT
    loss = functional.cross_entropy(outputs, labels.flatten() if flattened else labels)
    facts = facts_of(loss, outputs)
    assert facts.terms.round().tolist() == [T, 2, T, T, T]


PENALTIES = {
    "squares": lambda w: (w**2).sum(),
    "squared distances": lambda w: ((w - w.detach() / 2) ** 2).mean(),
    "a squared norm": lambda w: w.norm().pow(2),
    "squared error": lambda w: functional.mse_loss(w, torch.zeros_like(w)),
    "absolute values": lambda w: w.abs().sum(),
    "entropy": lambda w: (w.softmax(1) * w.log_softmax(1)).sum(),
}


@pytest.mark.parametrize("name", PENALTIES)
@pytest.mark.parametrize("weight_shape", [(C, N), (N, C)], ids=["(C, N)", "(N, C)"])
def test_a_penalty_on_parameters_is_not_a_loss_of_samples(name, weight_shape):
    weight = draw(*weight_shape, seed=4).requires_grad_()

    def summary(strength):
        outputs = draw(N, weight_shape[1]) @ weight.mT
        loss = functional.mse_loss(outputs, torch.zeros_like(outputs))
        loss = loss + strength * PENALTIES[name](weight)
        assert [type(node).__name__ for node in losses_of(loss, outputs)] == ["SquaredLoss"]
        return facts_of(loss, outputs)

    penalized, plain = summary(0.1), summary(0.0)
    torch.testing.assert_close(penalized.terms, plain.terms)
    torch.testing.assert_close(penalized.spread, plain.spread)


def test_a_penalty_on_activations_is_a_loss_of_samples():
    hidden = draw(N, C).requires_grad_() * 1.0
    loss = functional.cross_entropy(2 * hidden, classes(N)) + 0.1 * (hidden**2).mean()
    kinds = {type(node).__name__ for node in losses_of(loss, hidden)}
    assert kinds == {"SoftmaxLoss", "SquarePower"}


@pytest.mark.parametrize("strength", [1e-3, 10.0], ids=["minor", "major"])
def test_squares_that_are_a_small_part_of_the_loss_do_not_describe_it(strength):
    """As in an autoencoder with absolute errors, whose KL divergence contains squared means."""
    hidden = draw(N, C).requires_grad_() * 1.0
    loss = (hidden.sinh() - 1).abs().mean() + strength * (hidden**2).mean()
    facts = facts_of(loss, hidden, loss)
    for values in (facts.spread, facts.full_spread, facts.losses):
        assert values.isnan().all() == (strength < 1)


def test_a_learned_variance_is_no_square_of_a_residual():
    outputs = draw(N, 2).requires_grad_() * 1.0
    mean, deviation = outputs[:, 0], outputs[:, 1].exp()
    y = draw(N, seed=3)
    loss = -torch.distributions.Normal(mean, deviation).log_prob(y).mean()
    facts = facts_of(loss, outputs, loss)
    torch.testing.assert_close(facts.losses, (y - mean).detach().square())
    torch.testing.assert_close(facts.spread, (N * deviation**2 / (y - mean).square()).detach())


def focal_by_cross_entropy(outputs):
    losses = functional.cross_entropy(outputs, classes(N), reduction="none")
    return ((1 - (-losses).exp()) ** 2 * losses).mean()


def focal_by_log_softmax(outputs):
    log_p = outputs.log_softmax(1)
    return -((1 - log_p.exp()) ** 2 * log_p).gather(1, classes(N)[:, None]).mean()


def focal_of_logits(outputs):
    labels = probabilities(N, C).round()
    losses = functional.binary_cross_entropy_with_logits(outputs, labels, reduction="none")
    p = outputs.sigmoid()
    return (losses * (1 - (p * labels + (1 - p) * (1 - labels))) ** 2).sum(1).mean()


@pytest.mark.parametrize("focal", [focal_by_cross_entropy, focal_by_log_softmax, focal_of_logits])
def test_a_focal_loss_is_a_weighted_loss(focal):
    leaf = draw(N, C).requires_grad_()
    outputs = leaf * 1.0
    (node,) = losses_of(focal(outputs), outputs)
    assert node.name == "cross-entropy"


@pytest.mark.parametrize("focal", [focal_by_cross_entropy, focal_by_log_softmax])
def test_losses_and_margins_of_a_focal_loss_are_those_of_its_cross_entropy(focal):
    leaf = draw(N, C).requires_grad_()
    facts = facts_of(focal(outputs := leaf * 1.0), outputs)
    expected = facts_of(functional.cross_entropy(plain := leaf * 1.0, classes(N)), plain)
    torch.testing.assert_close(facts.losses, expected.losses)
    torch.testing.assert_close(facts.errors, expected.errors)
    torch.testing.assert_close(facts.margins, expected.margins)


def test_a_square_beside_a_product_of_another_loss_is_a_loss():
    hidden = draw(N, C).requires_grad_() * 1.0
    losses = functional.cross_entropy(2 * hidden, classes(N), reduction="none")
    loss = (losses * hidden.sigmoid().sum(1)).mean() + 0.1 * (hidden**2).sum()
    kinds = {type(node).__name__ for node in losses_of(loss, hidden)}
    assert kinds == {"SoftmaxLoss", "SquarePower"}


def test_a_loss_inside_a_layer_is_found():
    """Some modules return each sample's loss, or log-probabilities."""
    weight = draw(C, C, seed=4).requires_grad_()
    weight_product = draw(N, C) @ weight
    log_probabilities = weight_product.log_softmax(1)
    losses = functional.nll_loss(log_probabilities, classes(N), reduction="none")
    kinds = [type(node).__name__ for node in losses_of(losses.mean(), weight_product)]
    assert kinds == ["SoftmaxLoss"]


def test_a_loss_behind_a_reentrant_checkpoint_is_found():
    net = nn.Linear(C, C).double()
    outputs = checkpoint(net, draw(N, C).requires_grad_(), use_reentrant=True)
    loss = functional.cross_entropy(outputs, classes(N)) + (net.weight**2).sum()
    assert [type(node).__name__ for node in find_losses(loss, {outputs.grad_fn})] == ["SoftmaxLoss"]


def test_a_loss_that_is_not_linear_in_the_log_probabilities_is_unknown():
    outputs = draw(T, N, C).requires_grad_() * 1.0
    log_probabilities = outputs.log_softmax(dim=2)
    lengths, label_lengths = torch.full((N,), T), torch.full((N,), 2)
    labels = torch.ones(N, 2, dtype=torch.long)
    loss = functional.ctc_loss(log_probabilities, labels, lengths, label_lengths)
    facts = facts_of(loss, outputs)
    for values in (facts.spread, facts.full_spread, facts.losses):
        assert values.isnan().all()


def test_an_unsupported_loss_has_no_summary():
    leaf = draw(N, C).requires_grad_()
    outputs = leaf * 1.0
    loss = outputs.abs().mean()
    assert losses_of(loss, outputs) == []
    facts = facts_of(loss, outputs)
    assert facts.terms is None
    assert facts.spread is None
