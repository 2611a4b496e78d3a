"""The split of a training step into a model and a loss is inferred from the step."""

import copy

import pytest
import torch
import torchmetrics
from exact_gradients import DenseObjective, regression, to_dense
from lightning_models import Plain, loader, mlp, vectors
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional
from torch.utils.data import TensorDataset

from tda_lightning import FullInfluenceFunction
from tda_lightning.full_influence import EKFAC, ConjugateGradient, GaussNewton, Hessian, Objective
from tda_lightning.passes.model_state import preserved_state

pytest.importorskip("curvlinops", reason="the extra `solvers` is not installed")
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")

LABELS = vectors(11)[:][1]
X, TARGETS = regression(11, c=3)
BINARY = (TARGETS > 0).double()
WEIGHTS = torch.tensor([0.5, 1.0, 2.0]).double()
SMOOTH = nn.CrossEntropyLoss(weight=WEIGHTS, label_smoothing=0.1)


def network():
    torch.manual_seed(2)
    return nn.Sequential(nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 3))


def objective_of(model, y, batch_size=11, **settings):
    data = loader(TensorDataset(X, y), batch_size, shuffle=False)
    return Objective.of(model, list(model.parameters()), data, progress=False, **settings)


def matrix_of(curvature, model, y, batch_size=11, **settings):
    with preserved_state(model, "eval"):
        return to_dense(curvature.operator(objective_of(model, y, batch_size, **settings)))


def focal(outputs, y):
    losses = functional.cross_entropy(outputs, y, reduction="none")
    return ((1 - (-losses).exp()) * losses).mean()


def squared_focal(outputs, y):
    losses = functional.cross_entropy(outputs, y, reduction="none")
    return ((1 - (-losses).exp()) ** 2 * losses).mean()


def indexed_log_softmax(outputs, y):
    return -outputs.log_softmax(dim=1)[torch.arange(len(y)), y].mean()


def two_losses(outputs, y):
    return functional.mse_loss(outputs[:, 1:], y[:, 1:]) + 3 * functional.smooth_l1_loss(
        outputs[:, :1], y[:, :1], beta=0.5
    )


@pytest.mark.parametrize(
    ("loss", "y"),
    [
        (functional.cross_entropy, LABELS),
        (functional.cross_entropy, TARGETS.softmax(dim=1)),
        (SMOOTH, LABELS),
        (focal, LABELS),
        (squared_focal, LABELS),
        (indexed_log_softmax, LABELS),
        (lambda o, y: functional.nll_loss(functional.log_softmax(o, dim=1), y), LABELS),
        (functional.mse_loss, TARGETS),
        (lambda o, y: ((o - y) ** 2).mean(), TARGETS),
        (lambda o, y: torch.square(y - o).sum(dim=1).mean(), TARGETS),
        (lambda o, y: torch.pow(input=o - torch.pow(2.0, y), exponent=2).mean(), TARGETS),
        (functional.huber_loss, TARGETS),
        (functional.binary_cross_entropy_with_logits, BINARY),
        (
            lambda o, y: functional.binary_cross_entropy_with_logits(o, y, pos_weight=WEIGHTS),
            BINARY,
        ),
        (two_losses, TARGETS),
        (lambda o, y: functional.mse_loss(o, y) + functional.huber_loss(o, y), TARGETS),
    ],
    ids=[
        *("classes", "soft labels", "weighted", "focal", "focal, squared", "indexed", "nll", "mse"),
        *("power", "square", "pow", "huber", "binary", "weighted binary", "two", "two of one"),
    ],
)
def test_the_gauss_newton_matrix_is_that_of_the_users_own_loss(loss, y):
    model = Plain(network(), loss).double()
    expected = DenseObjective(model, X, y).gauss_newton()
    torch.testing.assert_close(matrix_of(GaussNewton(), model, y), expected)


@pytest.mark.parametrize("curvature", [GaussNewton(), Hessian()], ids=repr)
def test_batches_are_weighted_by_their_sizes(curvature):
    model = Plain(network()).double()
    whole_batch = matrix_of(curvature, model, LABELS)
    torch.testing.assert_close(matrix_of(curvature, model, LABELS, 3), whole_batch)
    model.loss = nn.CrossEntropyLoss(reduction="sum")
    parts = matrix_of(curvature, model, LABELS, 3, reduction="sum")
    torch.testing.assert_close(parts, whole_batch)


class Regularised(Plain):
    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        assert loss.item() > 0  # a step may read values
        penalty = sum(weight.pow(2).sum() for weight in self.parameters())
        return {"loss": loss + 0.05 * penalty, "other": None}


class Counting(Plain):
    def __init__(self, net):
        super().__init__(net)
        self.accuracy = torchmetrics.Accuracy("multiclass", num_classes=3)
        self.mean = torchmetrics.MeanMetric()

    def training_step(self, batch, batch_idx):
        self.log("accuracy", self.accuracy(self.net(batch[0]), batch[1]))
        loss = super().training_step(batch, batch_idx)
        self.mean.update(loss)
        return loss


@pytest.mark.parametrize("curvature", [GaussNewton(), Hessian()], ids=repr)
def test_metrics_in_the_step_neither_change_the_curvature_nor_are_changed(curvature):
    model, plain = Counting(network()).double(), Plain(network()).double()
    model.mean.update(2.0)
    expected = matrix_of(curvature, plain, LABELS, 5)
    torch.testing.assert_close(matrix_of(curvature, model, LABELS, 5), expected)
    assert (model.accuracy._update_count, model.mean._update_count) == (0, 1)
    assert copy.deepcopy(model).mean.compute() == 2.0


def test_a_penalty_on_the_weights_adds_its_own_curvature():
    y = LABELS
    expected = DenseObjective(Plain(network()).double(), X, y).gauss_newton()
    actual = matrix_of(GaussNewton(), Regularised(network()).double(), y)
    torch.testing.assert_close(actual, expected + 0.1 * torch.eye(len(expected)).double())


@pytest.mark.slow
def test_attention_can_be_differentiated_twice():
    torch.manual_seed(1)
    net = nn.Sequential(
        nn.Unflatten(1, (7, 1)),
        nn.Linear(1, 4),
        nn.TransformerEncoderLayer(4, 2, 5, batch_first=True),
        nn.Flatten(),
        nn.Linear(28, 3),
    )
    model = Plain(net).double()
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        exact = DenseObjective(model, X, LABELS)
        expected, full = exact.gauss_newton(), exact.hessian()
    torch.testing.assert_close(matrix_of(GaussNewton(), model, LABELS), expected)
    torch.testing.assert_close(matrix_of(Hessian(), model, LABELS), full)


def test_the_user_can_specify_the_split():
    model = Plain(network(), lambda o, y: (o - y).abs().pow(3).mean()).double()
    curvature = GaussNewton(
        outputs=lambda module, batch: module.net(batch[0]),
        loss=lambda outputs, batch: (outputs - batch[1]).abs().pow(3).mean(),
    )
    expected = DenseObjective(model, X, TARGETS).gauss_newton()
    torch.testing.assert_close(matrix_of(curvature, model, TARGETS), expected)


@pytest.mark.parametrize(
    "loss",
    [
        lambda o, y: (o - y).abs().mean(),
        lambda o, y: functional.mse_loss(o, y) + o.exp().mean(),
        lambda o, y: functional.mse_loss(o.detach(), y) + 0 * o.sum() + o.cosh().sum(),
    ],
    ids=["unsupported", "partly unsupported", "without gradient"],
)
def test_losses_other_than_torchs_are_refused(loss):
    model = Plain(network(), loss).double()
    with pytest.raises(ValueError, match=r"computed by torch's loss functions.*Hessian\(\)"):
        matrix_of(GaussNewton(), model, TARGETS)


@pytest.mark.parametrize(
    ("loss", "y", "message"),
    [
        (SMOOTH, LABELS, "got `cross_entropy` of a tensor.* with label_smoothing, weight"),
        (lambda o, y: functional.mse_loss(o.view(-1, 1), y.view(-1, 1)), TARGETS, "3 samples"),
        (functional.huber_loss, TARGETS, "got `huber_loss`"),
        (functional.cross_entropy, TARGETS.softmax(dim=1), "supports class indices.*as labels"),
        (two_losses, TARGETS, "has 2 parts; expected one"),
        (lambda o, y: functional.cross_entropy(o, y) * y.sum(), LABELS, "not a positive multiple"),
    ],
    ids=["weighted", "sequences", "huber", "soft labels", "two", "by batch"],
)
def test_ekfac_refuses_unsupported_losses(loss, y, message):
    model = Plain(network(), loss).double()
    with preserved_state(model, "eval"), pytest.raises(ValueError, match=message):
        EKFAC().operator(objective_of(model, y, 3), GaussNewton())


def test_hooks_are_removed_if_the_curvature_fails():
    model = Plain(nn.Sequential(nn.Linear(7, 3), UncalledLayer(3))).double()
    method = FullInfluenceFunction(EKFAC(), damping=0.1)
    size = sum(parameter.numel() for parameter in model.parameters())
    with preserved_state(model, "eval"), pytest.raises(ValueError, match="cannot be computed"):
        method.solve(objective_of(model, LABELS), torch.ones(1, size).double(), progress=False)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


class UncalledLayer(nn.Module):
    """Uses the weight of a layer that it never calls."""

    def __init__(self, d):
        super().__init__()
        self.inner = nn.Linear(d, d)

    def forward(self, x):
        return functional.linear(x, self.inner.weight, self.inner.bias)


def test_steps_that_cannot_be_differentiated_twice_are_refused():
    model = Plain(nn.Sequential(nn.Linear(7, 3), OnceDifferentiable())).double()
    method = FullInfluenceFunction(ConjugateGradient(), damping=0.1)
    with preserved_state(model, "eval"), pytest.raises(ValueError, match="differentiate twice"):
        method.solve(objective_of(model, LABELS), torch.ones(1, 24).double(), progress=False)


class OnceDifferentiable(nn.Module):
    def forward(self, x):
        return OnceOnly.apply(x)


class OnceOnly(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return 2 * grad


class OwnNorm(nn.LayerNorm):
    def forward(self, x):
        return torch.native_layer_norm(x, [3], self.weight, self.bias, self.eps)[0]


def test_second_derivatives_of_kernels_are_exact():
    model = Plain(nn.Sequential(nn.Linear(7, 3), OwnNorm(3), nn.Tanh())).double()
    exact = DenseObjective(model, X, LABELS)
    torch.testing.assert_close(matrix_of(GaussNewton(), model, LABELS), exact.gauss_newton())
    torch.testing.assert_close(matrix_of(Hessian(), model, LABELS), exact.hessian())


def test_the_curvature_of_a_normalised_network_equals_that_of_two_backward_passes():
    model = Plain(mlp()).double()
    exact = DenseObjective(model, X, LABELS)
    torch.testing.assert_close(matrix_of(GaussNewton(), model, LABELS), exact.gauss_newton())
    torch.testing.assert_close(matrix_of(Hessian(), model, LABELS), exact.hessian())
