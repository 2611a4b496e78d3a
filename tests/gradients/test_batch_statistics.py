"""Rows of weights in front of a batch norm, against the gradient of each sample's own loss."""

from dataclasses import replace

import pytest
import torch
from lightning_models import Plain, loader, quiet_trainer
from networks import data_of
from torch import nn
from torch.nn import functional

from tda_lightning import GradientRecorder, Identity, Kronecker, record_queries
from tda_lightning.gradients.nodes.normalized import NormBackward
from tda_lightning.gradients.parameter_selection import select_parameters
from tda_lightning.gradients.row_recorder import RowRecorder
from tda_lightning.passes.queries import identified_rows
from tda_lightning.stores import MemoryStore

N = 7


WHOLE = Identity()


def record(net, x, y, projector=WHOLE, labels="given", followed=()):
    """Return the recorded rows of the mean loss, block by block, and the recorder."""
    selection = select_parameters(net)
    settings = ({}, projector, torch.float64, labels, (), followed)
    with RowRecorder(net, selection, *settings) as recorder:
        recorder.start(len(x))
        loss = functional.cross_entropy(net(x), y)
        recorder.start_backward(loss)
        loss.backward()
        batch = recorder.end_backward()
    rows = batch.rows.split(recorder.widths, dim=1)
    names = [block.name for block in selection.blocks]
    return dict(zip(names, rows, strict=True)), batch


def own_gradients(net, x, y):
    """Return the gradient of each sample's own term of the loss, through the whole batch."""
    losses = functional.cross_entropy(net(x), y, reduction="none") / len(x)
    samples = [
        torch.autograd.grad(loss, list(net.parameters()), retain_graph=True, allow_unused=True)
        for loss in losses
    ]
    columns = zip(*samples, strict=True)
    names = [name for name, _ in net.named_parameters()]
    return {
        name: torch.stack(column).flatten(1) for name, column in zip(names, columns, strict=True)
    }


def pooled(convolution, channels, norm=nn.BatchNorm2d):
    pool = {nn.BatchNorm1d: nn.AdaptiveAvgPool1d, nn.BatchNorm2d: nn.AdaptiveAvgPool2d}[norm](1)
    return nn.Sequential(
        convolution, norm(channels), nn.Tanh(), pool, nn.Flatten(), nn.Linear(channels, 3)
    ).double()


CASES = {
    "linear": (
        lambda: nn.Sequential(
            nn.Linear(5, 11), nn.BatchNorm1d(11), nn.Tanh(), nn.Linear(11, 3)
        ).double(),
        (5,),
    ),
    "linear without bias": (
        lambda: nn.Sequential(
            nn.Linear(5, 11, bias=False), nn.BatchNorm1d(11), nn.Tanh(), nn.Linear(11, 3)
        ).double(),
        (5,),
    ),
    "convolution": (lambda: pooled(nn.Conv2d(2, 5, 3, padding=1), 5), (2, 5, 3)),
    "convolution with stride": (
        lambda: pooled(nn.Conv2d(2, 5, 3, stride=2, bias=False), 5),
        (2, 7, 11),
    ),
    "one axis": (lambda: pooled(nn.Conv1d(3, 5, 3), 5, nn.BatchNorm1d), (3, 7)),
    "groups": (lambda: pooled(nn.Conv2d(4, 8, 3, groups=2), 8), (4, 5, 5)),
    "depthwise": (lambda: pooled(nn.Conv2d(4, 4, 3, groups=4), 4), (4, 5, 5)),
}


def case(name):
    torch.manual_seed(0)
    make, shape = CASES[name]
    net = make()
    for parameter in net[1].parameters():
        nn.init.uniform_(parameter, 0.5, 1.5)
    return net, torch.randn(N, *shape, dtype=torch.double), torch.arange(N) % 3


@pytest.mark.parametrize("name", CASES)
def test_rows_in_front_of_the_last_batch_norm_are_gradients_of_the_samples_own_loss(name):
    net, x, y = case(name)
    rows, _ = record(net, x, y)
    expected = own_gradients(net, x, y)
    expected["0.bias"] = None  # Not recorded: it has no effect.
    for parameter, values in rows.items():
        if expected[parameter] is not None:
            torch.testing.assert_close(values, expected[parameter])


@pytest.mark.parametrize("name", CASES)
def test_projected_rows_are_projections_of_the_rows(name):
    net, x, y = case(name)
    projector = Kronecker(3)
    rows, _ = record(net, x, y, projector)
    whole, _ = record(net, x, y)
    selection = select_parameters(net)
    sketcher = projector.bind(selection.blocks, torch.device("cpu"), torch.float64)
    block = selection.blocks[0]
    for row, gradient in zip(rows["0.weight"], whole["0.weight"], strict=True):
        expected = sketcher.sketch_matrix(0, gradient.reshape(block.rows, block.columns))
        torch.testing.assert_close(row, expected[: len(row)])


@pytest.mark.parametrize("name", CASES)
def test_rows_are_orthogonal_to_a_weight_whose_scale_has_no_effect(name):
    net, x, y = case(name)
    net[1].eps = 1e-30
    rows, _ = record(net, x, y)
    weight = net[0].weight.detach().flatten(1)  # (channels, columns)
    by_channel = rows["0.weight"].unflatten(1, weight.shape)
    products = (by_channel * weight).sum(dim=2)
    torch.testing.assert_close(products, torch.zeros_like(products))
    assert by_channel.norm() > 1e-3


def test_rows_of_a_deep_network_sum_to_its_gradient():
    torch.manual_seed(0)
    layers = [nn.Conv2d(2, 5, 3, padding=1), nn.BatchNorm2d(5), nn.ReLU()]
    layers += [nn.Conv2d(5, 7, 3), nn.BatchNorm2d(7), nn.ReLU()]
    net = nn.Sequential(*layers, nn.Flatten(), nn.Linear(7 * 9, 3)).double()
    x, y = torch.randn(N, 2, 5, 5, dtype=torch.double), torch.arange(N) % 3
    rows, _ = record(net, x, y)
    for name, parameter in net.named_parameters():
        if name not in ("0.bias", "3.bias"):
            torch.testing.assert_close(rows[name].sum(dim=0), parameter.grad.flatten())


def test_rows_of_sampled_labels_are_orthogonal_to_the_weight_too():
    net, x, y = case("convolution")
    net[1].eps = 1e-30
    _, batch = record(net, x, y, labels="sampled")
    weight = net[0].weight.detach().flatten(1)
    rows = batch.curvature_rows[:, : weight.numel()].unflatten(1, weight.shape)
    products = (rows * weight).sum(dim=2)
    torch.testing.assert_close(products, torch.zeros_like(products))
    assert rows.norm() > 1e-3


def evaluation(net, x):
    """Put a network into evaluation mode, with running statistics that are those of a batch."""
    outputs = net[0](x).detach()
    axes = [0, *range(2, outputs.ndim)]
    net[1].running_mean.copy_(outputs.mean(dim=axes))
    net[1].running_var.copy_(outputs.var(dim=axes, correction=0))
    return net.eval()


@pytest.mark.parametrize("name", [name for name in CASES if "linear" not in name])
def test_in_evaluation_running_statistics_that_follow_a_weight_act_like_those_of_the_batch(name):
    net, x, y = case(name)
    expected = own_gradients(net, x, y)["0.weight"]
    rows, _ = record(evaluation(net, x), x, y, followed=["0.weight"])
    torch.testing.assert_close(rows["0.weight"], expected)


@pytest.mark.parametrize("name", CASES)
def test_in_evaluation_running_statistics_are_constant_by_default(name):
    net, x, y = case(name)
    rows, _ = record(evaluation(net, x), x, y)
    for parameter, expected in own_gradients(net, x, y).items():
        torch.testing.assert_close(rows[parameter], expected)


def test_few_outputs_have_no_statistics_that_a_query_could_use():
    net, x, y = case("linear")
    evaluation(net, x)
    plain, _ = record(net, x[:3], y[:3])
    followed, _ = record(net, x[:3], y[:3], followed=["0.weight"])
    torch.testing.assert_close(followed["0.weight"], plain["0.weight"])


def run_of(net):
    model, store = Plain(net), MemoryStore()
    recorder = GradientRecorder(store, projector=Identity())
    quiet_trainer(recorder, max_epochs=1).fit(model, loader(data_of((2, 5, 3)), 7))
    return model, store


def test_queries_include_that_running_statistics_follow_the_weights():
    model, run = run_of(case("convolution")[0])
    assert run.recipe.normalized == ("net.0.weight",)
    queries = next(iter(loader(data_of((2, 5, 3)), 7)))
    rows = record_queries(model, queries, like=run)
    constant = identified_rows(model, queries, replace(run.recipe, normalized=())).rows
    weight, bias = run.recipe.widths[:2]
    assert not torch.allclose(rows[:, :weight], constant[:, :weight])
    torch.testing.assert_close(rows[:, weight + bias :], constant[:, weight + bias :])


def test_statistics_that_stayed_constant_in_training_are_constant_in_queries():
    net, _, _ = case("convolution")
    net[1].eval()
    net[1].train = lambda mode=True: net[1]
    _, run = run_of(net)
    assert run.recipe.normalized == ()


def test_nothing_is_computed_for_a_norm_without_a_recorded_weight_in_front(monkeypatch):
    passed = []
    original = NormBackward.of
    monkeypatch.setattr(NormBackward, "of", lambda call: passed.append(call) or original(call))
    torch.manual_seed(0)
    head = (nn.Flatten(), nn.Linear(30, 3))
    behind = nn.Sequential(nn.Conv2d(2, 2, 1), nn.ReLU(), nn.BatchNorm2d(2), *head).double()
    in_front = nn.Sequential(nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2), nn.ReLU(), *head).double()
    x, y = torch.randn(N, 2, 5, 3).double(), torch.arange(N) % 3
    record(behind, x, y)
    assert len(passed) == 0
    record(in_front, x, y)
    assert len(passed) == 1
