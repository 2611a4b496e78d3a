"""The reduction of a loss, read off its graph."""

import pytest
import torch
from lightning_models import Plain, loader, mlp, quiet_trainer, vectors
from torch import nn
from torch.nn import functional as F

from tda_lightning import GradientRecorder, HDF5Store, Unrolled, attribute
from tda_lightning.gradients.losses import reduction_of
from tda_lightning.stores import MemoryStore

N, CLASSES = 5, 3
OUT, LABELS = torch.randn(N, 3, generator=torch.Generator().manual_seed(0)), torch.arange(N) % 3
TARGETS, WEIGHT = torch.rand(N, 3, generator=torch.Generator().manual_seed(1)), torch.randn(7, 3)


def cross_entropy(**settings):
    return lambda out: F.cross_entropy(out, LABELS, **settings)


CASES = {
    "cross-entropy, mean": (cross_entropy(), "mean"),
    "cross-entropy, sum": (cross_entropy(reduction="sum"), "sum"),
    "smoothed, sum": (cross_entropy(reduction="sum", label_smoothing=0.1), "sum"),
    "smoothed, mean": (cross_entropy(label_smoothing=0.1), "mean"),
    "summed afterwards": (lambda out: cross_entropy(reduction="none")(out).sum(), "sum"),
    "averaged afterwards": (lambda out: cross_entropy(reduction="none")(out).mean(), "mean"),
    "squares, sum": (lambda out: F.mse_loss(out, TARGETS, reduction="sum"), "sum"),
    "squares, mean": (lambda out: F.mse_loss(out, TARGETS), "mean"),
    "squares by hand, sum": (lambda out: ((out - TARGETS) ** 2).sum(), "sum"),
    "mean of sums": (lambda out: ((out - TARGETS) ** 2).sum(dim=1).mean(), "mean"),
    "binary, sum": (
        lambda out: F.binary_cross_entropy_with_logits(out, TARGETS, reduction="sum"),
        "sum",
    ),
    "Huber, sum": (lambda out: F.huber_loss(out, TARGETS, reduction="sum"), "sum"),
    "with a penalty": (lambda out: cross_entropy()(out) + (WEIGHT_IN_GRAPH**2).sum(), "mean"),
    "a factor": (lambda out: 3 * cross_entropy()(out), None),
    "class weights": (cross_entropy(weight=torch.tensor([1.0, 2.0, 3.0]), reduction="sum"), None),
    "a quotient of one": (lambda out: cross_entropy(reduction="sum")(out) / LABELS[:2].sum(), None),
    "a mean by hand": (lambda out: cross_entropy(reduction="sum")(out) / len(out), "mean"),
    "not a known loss": (lambda out: out.square().sum().sqrt(), None),
}
WEIGHT_IN_GRAPH = WEIGHT.clone().requires_grad_()


@pytest.mark.parametrize("name", CASES)
def test_the_reduction_is_read_off_the_graph(name):
    loss, expected = CASES[name]
    out = OUT.clone().requires_grad_()
    assert reduction_of(loss(out), N) == expected
    assert out.grad is None
    assert reduction_of(loss(out) / 4, N, share=1 / 4, quotients=1) == expected


def test_one_sample_leaves_it_open():
    out = OUT[:1].clone().requires_grad_()
    assert reduction_of(F.cross_entropy(out, LABELS[:1], reduction="sum"), 1) is None


def summed(out, labels):
    return F.cross_entropy(out, labels, reduction="sum")


def train(loss, store=None, **settings):
    torch.manual_seed(0)
    trainer = {key: settings.pop(key) for key in ("accumulate_grad_batches",) if key in settings}
    store = MemoryStore() if store is None else store
    model = Plain(mlp(), loss, lambda p: torch.optim.SGD(p, lr=0.01))
    quiet_trainer(GradientRecorder(store, **settings), **trainer).fit(model, loader(vectors()))
    return model, store


def same_scores(first, second):
    values = [
        attribute(store, model, vectors()[:3], method=Unrolled(), progress=False).values
        for model, store in (first, second)
    ]
    torch.testing.assert_close(*values)
    assert values[0].abs().max() > 0


@pytest.mark.parametrize("settings", [{}, {"accumulate_grad_batches": 2}, {"max_overhead": 1e6}])
def test_a_forgotten_sum_is_recorded_as_one(settings, tmp_path):
    inferred = train(summed, HDF5Store(tmp_path / "run", storage="as computed"), **settings)
    given = train(summed, reduction="sum", **settings)
    assert inferred[1].recipe.reduction == given[1].recipe.reduction == "sum"
    assert HDF5Store.open(tmp_path / "run").recipe.reduction == "sum"
    for a, b in zip(inferred[1], given[1], strict=True):
        torch.testing.assert_close(a.weights, b.weights)
    same_scores(inferred, given)


def test_a_sum_over_the_number_of_positives_counts_as_a_mean_even_if_there_is_one():
    def loss(out, y):
        return F.cross_entropy(out, y, reduction="sum") / (y == CLASSES).sum().clamp_min(1)

    assert train(loss)[1].recipe.reduction == "mean"


def test_a_mean_stays_a_mean():
    model, store = train(nn.functional.cross_entropy)
    assert store.recipe.reduction == "mean"
    same_scores((model, store), train(nn.functional.cross_entropy, reduction="mean"))


@pytest.mark.parametrize(
    ("loss", "given", "other"), [(summed, "mean", "sum"), (F.cross_entropy, "sum", "mean")]
)
def test_a_given_reduction_that_the_loss_contradicts_warns_once(loss, given, other):
    message = f"`reduction` is '{given}', but the first loss is the {other} over its samples"
    with pytest.warns(UserWarning, match=message) as caught:
        _, store = train(loss, reduction=given)
    assert sum(message in str(warning.message) for warning in caught) == 1
    assert store.recipe.reduction == given
