"""Unlearning: updates against exact solutions, and reports of models that are left as they are."""

import copy

import pytest
import torch
from lightning_models import Plain, loader, quiet_trainer
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from tda_lightning import GradientRecorder, Identity, KroneckerCountSketch, Unrolled, embed
from tda_lightning.applications import (
    FirstOrder,
    Replay,
    SampledRetraining,
    SecondOrder,
    UnrolledUpdate,
    rewind_plan,
    unlearn,
)
from tda_lightning.applications.unlearning.sampled_retraining import inclusion_probabilities
from tda_lightning.full_influence import EKFAC, ConjugateGradient, GaussNewton, Hessian
from tda_lightning.stores import MemoryStore

FORGET = [2, 7, 9]


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.1)


class Model(Plain):
    def forward(self, x):
        return self.net(x)


def classes(n=13):
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(n, 5, generator=generator, dtype=torch.float64)
    return TensorDataset(x, torch.randint(3, (n,), generator=generator))


def targets(n=13):
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(n, 3, generator=generator, dtype=torch.float64)
    return TensorDataset(x, torch.randn(n, 1, generator=generator, dtype=torch.float64))


def trained(data, net, optimizer, loss=nn.functional.cross_entropy, epochs=3, **settings):
    torch.manual_seed(1)
    store, model = MemoryStore(), Model(net.double(), loss, optimizer)
    recorder = GradientRecorder(store, **{"projector": Identity(), "snapshots": 0, **settings})
    trainer = quiet_trainer(recorder, max_epochs=epochs, precision="64-true")
    trainer.fit(model, loader(data, 5))
    return model, store


def net(d=5, classes=3):
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(d, 7), nn.Tanh(), nn.Linear(7, classes))


def moved(model, result):
    pairs = [(result.state_dict[name] - p).flatten() for name, p in model.named_parameters()]
    return torch.cat(pairs).detach()


@pytest.mark.parametrize(
    "optimizer",
    [
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1),
        lambda p: torch.optim.SGD(p, lr=0.1),
        lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.3),
    ],
    ids=["momentum", "sgd", "adamw"],
)
def test_the_unrolled_update_is_the_sum_of_the_data_value_embeddings(optimizer):
    model, store = trained(classes(), net(), optimizer)
    result = unlearn(
        model, store, loader(classes()), FORGET, update=UnrolledUpdate(), progress=False
    )
    embeddings = embed(store, Unrolled(), progress=False)
    total = embeddings.vectors[torch.isin(embeddings.train_ids, torch.tensor(FORGET))].sum(dim=0)
    factors = store.preconditioner()
    if factors is not None:  # back to the coordinates of the parameters
        blocks, rows, columns = store.recipe.blocks, factors.rows, factors.columns
        pairs = zip(
            rows.split([block.rows for block in blocks]),
            columns.split([block.columns for block in blocks]),
            strict=True,
        )
        total = total * torch.cat([torch.outer(*pair).flatten() for pair in pairs])
    by_name = dict(model.named_parameters())
    names = [name for block in store.recipe.blocks for name in block.parameters]
    parts = total.split([by_name[name].numel() for name in names])
    for name, part in zip(names, parts, strict=True):
        actual = (result.state_dict[name] - by_name[name]).flatten()
        torch.testing.assert_close(actual.detach(), part.to(actual), rtol=1e-6, atol=1e-9)


def squared_by_hand(outputs, y):
    return ((outputs - y) * (outputs - y)).mean()


@pytest.mark.filterwarnings("ignore:The weights or running statistics of `model`")
@pytest.mark.parametrize(
    ("loss", "curvature"),
    [(nn.functional.mse_loss, GaussNewton()), (squared_by_hand, Hessian())],
    ids=["known loss", "unknown loss"],
)
def test_a_newton_step_on_a_quadratic_loss_is_exact_retraining(loss, curvature):
    pytest.importorskip("curvlinops", reason="the extra `solvers` is not installed")
    data = targets()
    x, y = data.tensors
    model, store = trained(
        data,
        nn.Linear(3, 1, bias=False),
        sgd,
        loss,
    )
    with torch.no_grad():
        model.net.weight.copy_(torch.linalg.lstsq(x, y).solution.mT)
    keep = [i for i in range(13) if i not in FORGET]
    retrained = torch.linalg.lstsq(x[keep], y[keep]).solution.mT
    update = SecondOrder(ConjugateGradient(tolerance=1e-12), damping=1e-10, curvature=curvature)
    result = unlearn(model, store, loader(data), FORGET, update=update, progress=False)
    torch.testing.assert_close(result.state_dict["net.weight"], retrained, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("optimizer", "snapshots", "reason"),
    [(sgd, 2, "the 5 snapshots of the run"), (torch.optim.AdamW, 0, "optimizer rescales")],
    ids=["snapshots", "adamw"],
)
def test_ekfac_is_refused_with_a_solver_to_use_instead(optimizer, snapshots, reason):
    model, store = trained(classes(), net(), optimizer, snapshots=snapshots)
    update = SecondOrder(EKFAC())
    with pytest.raises(ValueError, match=rf"{reason}\. Use `Woodbury\(\)`"):
        unlearn(model, store, loader(classes()), FORGET, update=update, progress=False)


@pytest.mark.parametrize("update", [SecondOrder(), Replay()])
def test_a_loss_without_sampled_labels_names_the_solver_that_needs_none(update):
    model, store = trained(targets(), nn.Linear(3, 1), sgd, squared_by_hand, snapshots=3)
    words = r"^Labels cannot be sampled .* `ConjugateGradient\(\)` and `curvature=Hessian\(\)`"
    with pytest.raises(ValueError, match=words):
        unlearn(model, store, loader(targets()), FORGET, update=update, progress=False)


def test_the_first_order_is_a_gradient_step_up():
    data = classes()
    model, store = trained(data, net(), sgd)
    result = unlearn(model, store, loader(data), FORGET, update=FirstOrder(0.01), progress=False)
    x, y = data[FORGET]
    loss = nn.functional.cross_entropy(model.net(x), y, reduction="sum")
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    expected = 0.01 * torch.cat([gradient.flatten() for gradient in gradients])
    torch.testing.assert_close(moved(model, result), expected)


def scheduled(parameters):
    optimizer = torch.optim.SGD(parameters, lr=0.2, momentum=0.9)
    return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)]


def retrained_without(store, network, optimizer, data):
    """Return the same training without the forgotten samples, by hand."""
    again = Model(network.double(), optimizer=optimizer)
    fresh = again.configure_optimizers()
    fresh = fresh["optimizer"] if isinstance(fresh, dict) else fresh[0][0]
    for step in store:
        ids = [i for i in step.sample_ids.tolist() if i not in FORGET]
        fresh.param_groups[0]["lr"] = 0.2 * 0.5**step.epoch if optimizer is scheduled else 0.01
        fresh.zero_grad()
        x, y = data[ids]
        nn.functional.cross_entropy(again(x), y).backward()
        fresh.step()
    return again


@pytest.mark.parametrize(
    "optimizer",
    [scheduled, lambda p: {"optimizer": torch.optim.AdamW(p, lr=0.01)}],
    ids=["scheduled momentum", "adamw"],
)
def test_a_replay_of_the_whole_training_is_exact_retraining(optimizer):
    data = classes()
    model, store = trained(data, net(), optimizer, snapshots=1)
    before = copy.deepcopy(model.state_dict())
    gradient = model.net[0].weight.grad
    result = unlearn(model, store, loader(data), FORGET, update=Replay(1.0), progress=False)
    for name, value in retrained_without(store, net(), optimizer, data).state_dict().items():
        torch.testing.assert_close(result.state_dict[name], value)
        assert torch.equal(model.state_dict()[name], before[name])
    assert model.net[0].weight.grad is gradient


@pytest.mark.parametrize(
    "optimizer",
    [scheduled, lambda p: {"optimizer": torch.optim.AdamW(p, lr=0.01)}],
    ids=["scheduled momentum", "adamw"],
)
def test_a_sampled_retraining_is_exact_with_all_samples_and_close_with_half(optimizer):
    data = classes(23)
    model, store = trained(data, net(), optimizer, epochs=6, snapshots=1)
    other = retrained_without(store, net(), optimizer, data)
    before = copy.deepcopy(model.state_dict())
    pairs = zip(model.parameters(), other.parameters(), strict=True)
    goal = torch.cat([(after - before).detach().flatten() for before, after in pairs])

    def gap(update):
        result = unlearn(model, store, loader(data), FORGET, update=update, progress=False)
        return float((moved(model, result) - goal).norm() / goal.norm())

    # Factors of the coordinates are stored in single precision.
    assert gap(SampledRetraining(1.0)) < 1e-4
    gaps = [gap(SampledRetraining(0.5, seed)) for seed in range(3)]
    assert max(gaps) < 0.5
    assert len(set(gaps)) == 3
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


def test_the_samples_to_compute_again_are_drawn_by_the_norm_of_their_gradients():
    norms = torch.tensor([9.0, 0.0, 1.0, 2.0, 0.5], dtype=torch.float64)
    for share in (0.2, 0.5, 0.9):
        p = inclusion_probabilities(norms, share)
        assert float(p.mean()) == pytest.approx(share)
        assert float(p.max()) <= 1
        assert p[norms.argsort()].tolist() == sorted(p.tolist())
    assert inclusion_probabilities(norms, 1.0).tolist() == pytest.approx([1.0] * 5)
    assert inclusion_probabilities(0 * norms, 0.4).tolist() == pytest.approx([0.4] * 5)


def test_a_sampled_retraining_needs_a_training_that_can_be_repeated():
    data, settings = classes(), {"update": SampledRetraining(), "progress": False}
    model, store = trained(data, net(), sgd, snapshots=1, projector=KroneckerCountSketch(11))
    with pytest.raises(ValueError, match=r"projector=Identity\(\)"):
        unlearn(model, store, loader(data), FORGET, **settings)
    model, store = trained(data, net(), sgd)
    with pytest.raises(ValueError, match="lacks the first weights"):
        unlearn(model, store, loader(data), FORGET, **settings)
    with pytest.warns(UserWarning, match="not among `layers`"):
        model, store = trained(data, net(), sgd, snapshots=1, layers=["net.0"])
    with pytest.raises(ValueError, match=r"parameters of `net\.2`"):
        unlearn(model, store, loader(data), FORGET, **settings)
    with_dropout = nn.Sequential(*net(), nn.Dropout(0.5))
    model, store = trained(data, with_dropout, sgd, snapshots=1)
    with pytest.raises(ValueError, match=r"gradients of the first step .* without dropout"):
        unlearn(model, store, loader(data), FORGET, **settings)
    model, store = trained(data, net(), sgd, snapshots=1)
    model.optimizer = lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9)
    with pytest.raises(ValueError, match=r"weights after the last step .* same model"):
        unlearn(model, store, loader(data), FORGET, **settings)
    with pytest.raises(ValueError, match=r"`share` is 1\.5"):
        SampledRetraining(1.5)


def linear():
    torch.manual_seed(3)
    return nn.Linear(5, 3)


def test_a_replay_of_the_end_moves_a_convex_model_toward_the_retrained_one():
    data = classes()
    model, store = trained(data, linear(), scheduled, epochs=6, snapshots=1)
    other = retrained_without(store, linear(), scheduled, data)
    pairs = zip(model.parameters(), other.parameters(), strict=True)
    goal = torch.cat([(after - before).detach().flatten() for before, after in pairs])
    gaps = [goal.norm()]
    for share in (0.3, 0.7):
        update = Replay(share, before=FirstOrder(1e-12))
        result = unlearn(model, store, loader(data), FORGET, update=update, progress=False)
        gaps.append((moved(model, result) - goal).norm())
    assert gaps[0] > gaps[1] > gaps[2]


def test_a_replay_needs_every_step_snapshots_and_one_optimizer():
    data, settings = classes(), {"update": Replay(), "progress": False}
    model, store = trained(data, net(), sgd)
    with pytest.raises(ValueError, match="no snapshots to start from"):
        unlearn(model, store, loader(data), FORGET, **settings)
    model, store = trained(data, net(), sgd, snapshots=2, every_n_steps=2)
    with pytest.raises(ValueError, match="one of every 2 steps"):
        unlearn(model, store, loader(data), FORGET, **settings)
    model, store = trained(data, net(), sgd, snapshots=2)
    model.optimizer = lambda p: [torch.optim.SGD([q], lr=0.1) for q in p]
    with pytest.raises(ValueError, match="expected one optimizer"):
        unlearn(model, store, loader(data), FORGET, **settings)
    model.optimizer = lambda p: torch.optim.SGD([{"params": [q]} for q in p], lr=0.1)
    with pytest.raises(ValueError, match=r"4 parameter groups, and step \d+ of the run holds 1"):
        unlearn(model, store, loader(data), FORGET, **settings)
    with pytest.raises(ValueError, match=r"`share` is 0\.0"):
        Replay(0.0)


@pytest.mark.parametrize("snapshots", [0, pytest.param(3, marks=pytest.mark.slow)])
def test_the_second_order_moves_toward_a_retrained_model(snapshots):
    data = classes(23)
    model, store = trained(data, net(), sgd, epochs=15, snapshots=snapshots)
    rest = TensorDataset(*data[[i for i in range(23) if i not in FORGET]])
    other, _ = trained(rest, net(), sgd, epochs=17)
    result = unlearn(
        model,
        store,
        loader(data),
        FORGET,
        holdout=loader(classes(11)),
        retrained=other,
        progress=False,
    )
    assert result.losses["forget"]["after"] > result.losses["forget"]["before"]
    assert result.distances["forget"]["after"] < 0.7 * result.distances["forget"]["before"]
    assert set(result.membership_auc) == {"before", "after", "retrained"}
    assert list(result.to_pandas().index) == ["before", "after", "retrained"]
    assert "nothing is certified" in repr(result)
    assert "pass it as `retrained=`" not in repr(result)


def test_the_model_is_not_changed():
    data = classes()
    model, store = trained(data, net(), sgd, snapshots=2)
    before = copy.deepcopy(model.state_dict())
    result = unlearn(model, store, loader(data), FORGET, holdout=loader(data), progress=False)
    assert "pass it as `retrained=`" in repr(result)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
        assert value.data_ptr() != result.state_dict[name].data_ptr()
    assert model.training


def test_frozen_parameters_stay_and_are_named():
    network = net()
    network[0].bias.requires_grad_(False)
    model, store = trained(classes(), network, sgd)
    result = unlearn(model, store, loader(classes()), FORGET, progress=False)
    assert result.unchanged == ("net.0.bias",)
    assert torch.equal(result.state_dict["net.0.bias"], model.net[0].bias)
    assert "net.0.bias" in repr(result)


def test_unlearning_refuses_what_it_cannot_do():
    data = classes()
    model, store = trained(data, net(), sgd, projector=Identity())
    with pytest.raises(ValueError, match="Sample 99 is not among the 13"):
        unlearn(model, store, loader(data), [3, 99], progress=False)
    with pytest.raises(ValueError, match="expected some to remain"):
        unlearn(model, store, loader(data), range(13), progress=False)
    with pytest.raises(ValueError, match=r"lacks 2 of the 13 training samples.* has 0 others"):
        unlearn(model, store, loader(classes(11)), FORGET, progress=False)
    with pytest.raises(ValueError, match=r"lacks 0 of the 13 training samples.* has 4 others"):
        unlearn(model, store, loader(classes(17)), FORGET, progress=False)
    with pytest.raises(ValueError, match="Turn a mask into ids"):
        unlearn(model, store, loader(data), [True] * 13, progress=False)
    with pytest.raises(ValueError, match="expected a `DataLoader` of a dataset"):
        unlearn(model, store, DataLoader(Stream()), FORGET, progress=False)
    _, sketched = trained(data, net(), sgd, projector=KroneckerCountSketch(11))
    with pytest.raises(ValueError, match=r"projector=Identity\(\)"):
        unlearn(model, sketched, loader(data), FORGET, update=UnrolledUpdate(), progress=False)


class Stream(IterableDataset):
    def __iter__(self):
        return iter(classes())


def in_order(data):
    return DataLoader(data, batch_size=5)


def recorded_in_order(snapshots, **settings):
    store, model = MemoryStore(), Plain(net().double())
    recorder = GradientRecorder(store, snapshots=snapshots, **settings)
    quiet_trainer(recorder, max_epochs=2, precision="64-true").fit(model, in_order(classes()))
    return store


def test_the_plan_starts_from_the_latest_snapshot_before_the_first_visit():
    store = recorded_in_order(1)  # steps 0 to 2 visit 0-4, 5-9, 10-12
    plan = rewind_plan(store, [12, 7])
    assert plan.ids.tolist() == [7, 12]
    assert plan.first_steps.tolist() == [1, 2]
    assert plan.snapshot == 1
    assert plan.n_visits == (5 - 1) + (3 - 1) + 5 + (5 - 1) + (3 - 1)
    assert plan.cost == plan.n_visits / 26
    assert not plan.has_state
    assert rewind_plan(store, [11]).snapshot == 2
    assert list(plan.to_pandas()["first_step"]) == [1, 2]


def test_a_plan_without_early_snapshots_trains_new_weights():
    plan = rewind_plan(recorded_in_order([2]), [0])
    assert plan.snapshot is None
    assert plan.n_visits == 26 - 2
    assert "train new weights" in repr(plan)


def test_a_plan_for_unvisited_samples_keeps_the_model():
    store, model = MemoryStore(), Plain(net().double())
    trainer = quiet_trainer(
        GradientRecorder(store), max_epochs=2, precision="64-true", limit_train_batches=2
    )
    trainer.fit(model, in_order(classes()))
    plan = rewind_plan(store, [11, 12])
    assert plan.is_untouched
    assert plan.cost == 0
    assert "Keep the model" in repr(plan)


def test_a_run_with_a_stride_proves_nothing():
    with pytest.raises(ValueError, match="others may have visited"):
        rewind_plan(recorded_in_order(1, every_n_steps=2), [3])
