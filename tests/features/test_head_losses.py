"""The loss of a layer's outputs is inferred from two gradients, however well the model fits."""

import pytest
import torch
from lightning_models import Plain, loader, vectors
from torch import nn
from torch.nn import functional
from torch.nn.functional import cross_entropy, mse_loss
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import TensorDataset

from tda_lightning import RepresenterPoint
from tda_lightning.features import LocalJacobianExpansion, representers
from tda_lightning.features.extraction import query_features, train_features
from tda_lightning.features.losses import SoftmaxLoss, SquaredLoss, infer_loss

N, CLASSES = 17, 3
WEIGHTS = torch.tensor([0.5, 1.0, 2.0]).double()
confidence = pytest.mark.parametrize("confidence", [0.0, 1.0, 30.0, 3000.0])


def network(loss, confidence=1.0, classes=CLASSES):
    torch.manual_seed(2)
    net = nn.Sequential(nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, classes))
    with torch.no_grad():
        net[2].weight *= confidence
        net[2].bias *= confidence
    return Plain(net.double(), loss=loss)


def predicted_data(model):
    """Label data by the model's predictions: a more confident model fits them better."""
    x = vectors(N)[:][0].double()
    return x, model.net(x).argmax(dim=1)


def inferred_loss(model, batch):
    head = query_features(model, batch, reads="head", progress=False).head
    return infer_loss(head.double(), "net.2")


@confidence
@pytest.mark.parametrize(
    ("loss", "weights"),
    [
        (lambda z, y: 0.5 * cross_entropy(z, y), "0.5 to 0.5"),
        (lambda z, y: cross_entropy(z, y, reduction="sum"), "17 to 17"),
        (lambda z, y: (cross_entropy(z, y, reduction="none") * WEIGHTS[y]).mean(), "0.5 to 2"),
        (lambda z, y: 1.001 * cross_entropy(z, y, label_smoothing=0.2), "1 to 1"),
    ],
    ids=["half", "sum", "class weights", "a thousandth more, smoothed"],
)
def test_a_weighted_cross_entropy_raises_with_its_weights(loss, weights, confidence):
    model = network(loss, confidence)
    x, _ = predicted_data(model)
    batch = x, torch.arange(N) % CLASSES if confidence == 0 else predicted_data(model)[1]
    if confidence > 0:
        weights = weights.replace("0.5 to 2", "")  # not all classes are predicted
    with pytest.raises(ValueError, match=f"cross-entropy with weights of {weights}.*unweighted"):
        inferred_loss(model, batch)


def soft(labels):
    generator = torch.Generator().manual_seed(1)
    mixed = torch.rand(N, 1, generator=generator, dtype=torch.float64)
    return mixed * functional.one_hot(labels, CLASSES) + (1 - mixed) / CLASSES


def smoothed(outputs, labels):
    return cross_entropy(outputs, labels, label_smoothing=0.1)


@confidence
def test_labels_may_be_smoothed_or_mixed(confidence):
    model = network(smoothed, confidence)
    x, y = predicted_data(model)
    expected = 0.9 * functional.one_hot(y, CLASSES).double() + 0.1 / CLASSES
    inferred = inferred_loss(model, (x, y))
    assert isinstance(inferred, SoftmaxLoss)
    torch.testing.assert_close(inferred.targets, expected)
    torch.testing.assert_close(inferred_loss(network(cross_entropy), (x, soft(y))).targets, soft(y))


def test_the_refit_to_smoothed_labels_is_stationary_for_smoothed_labels():
    model = network(smoothed)
    x, y = predicted_data(model)
    refit = representers(model, loader(TensorDataset(x, y)), progress=False)
    weight = refit.weight.clone().requires_grad_()
    value = smoothed(refit.features @ weight.mT, y) + 3e-3 * weight.square().sum()
    (gradient,) = torch.autograd.grad(value, weight)
    assert gradient.abs().max() < 1e-9


@confidence
@pytest.mark.parametrize(
    "loss",
    [
        lambda z, y: cross_entropy(3 * z, y),
        lambda z, y: cross_entropy(z, y) + 1e-3 * z.square().mean(),
        lambda z, y: functional.multi_margin_loss(z, y),
        lambda z, y: ((1 - z.softmax(1)).square() * -z.log_softmax(1))[torch.arange(N), y].mean(),
    ],
    ids=["temperature", "penalty", "margin", "focal"],
)
def test_other_losses_of_labels_raise(loss, confidence):
    model = network(loss, confidence)
    with pytest.raises(ValueError, match="Representer points do not support the loss"):
        inferred_loss(model, predicted_data(model))


@confidence
@pytest.mark.parametrize(
    "loss",
    [
        lambda z, y: functional.binary_cross_entropy_with_logits(z[:, 0], (y == 1).double()),
        lambda z, y: functional.l1_loss(z[:, 0], y.double()),
        lambda z, y: functional.smooth_l1_loss(z[:, 0], z[:, 0].detach() + 0.1 * y),
        lambda z, y: (WEIGHTS[y] * (z[:, 0] - y).square()).mean(),
    ],
    ids=["binary", "absolute", "Huber", "weighted"],
)
def test_other_losses_of_one_output_raise(loss, confidence):
    model = network(loss, confidence, classes=1)
    batch = vectors(N)[:][0].double(), torch.arange(N) % CLASSES
    with pytest.raises(ValueError, match="Representer points do not support the loss"):
        inferred_loss(model, batch)


@confidence
@pytest.mark.parametrize("factor", [1e-3, 1.0, 700.0])
def test_a_squared_error_has_any_factor(factor, confidence):
    model = network(lambda z, y: factor * mse_loss(z, y), confidence)
    targets = torch.randn(N, CLASSES, dtype=torch.float64)
    inferred = inferred_loss(model, (vectors(N)[:][0].double(), targets))
    assert isinstance(inferred, SquaredLoss)
    assert inferred.factor == pytest.approx(2 * factor / CLASSES)
    torch.testing.assert_close(inferred.targets, targets)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("loss", [cross_entropy, smoothed, mse_loss])
def test_losses_are_inferred_in_any_number_format(loss, dtype):
    model = network(loss, 30.0).to(dtype)
    x = vectors(N)[:][0].to(dtype)
    y = model.net(x).argmax(dim=1) if loss is not mse_loss else 100 * torch.ones(N, 3).to(dtype)
    assert isinstance(
        inferred_loss(model, (x, y)), SquaredLoss if loss is mse_loss else SoftmaxLoss
    )
    scaled = Plain(model.net, loss=lambda z, y: 0.9 * cross_entropy(z, y))
    with pytest.raises(ValueError, match="do not support"):
        inferred_loss(scaled, (x, model.net(x).argmax(dim=1)))


@pytest.mark.parametrize("targets", ["probabilities", "numbers"])
def test_the_hessian_product_is_that_of_autograd(targets):
    outputs, direction = torch.randn(2, N, CLASSES, dtype=torch.float64)
    losses = {
        "probabilities": SoftmaxLoss(direction.softmax(1)),
        "numbers": SquaredLoss(direction, 0.7),
    }
    _, expected = torch.autograd.functional.hvp(
        lambda z: N * losses[targets].value(z), outputs, direction
    )
    torch.testing.assert_close(losses[targets].hessian_product(outputs, direction), expected)


class LargestTensor(TorchDispatchMode):
    """Records the size of the largest tensor."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.numel = max(self.numel, result.numel())
        return result


@pytest.mark.parametrize(
    ("method", "max_numel"),
    [(RepresenterPoint(), 31 * 53), (LocalJacobianExpansion(), (31 * 6) ** 2)],
    ids=["RepresenterPoint", "LocalJacobianExpansion"],
)
def test_memory_is_a_few_times_the_outputs_and_no_matrix_per_sample(method, max_numel):
    n, c = 53, 31
    x = vectors(n)[:][0].double()
    model = network(cross_entropy, classes=c)
    data = TensorDataset(x, torch.arange(n) % c)
    train = train_features(model, loader(data), reads="head", progress=False)
    with LargestTensor() as largest:
        method.attribute(train, train)
    assert largest.numel <= max(max_numel, n * n) < n * c * c
