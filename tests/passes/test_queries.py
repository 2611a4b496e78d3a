"""Queries are recorded like training batches, and the model's state is preserved."""

import pytest
import pytorch_lightning as pl
import torch
from lightning_models import Plain, TrainingLog, loader, mlp, quiet_trainer, vectors
from torch import nn
from torch.utils.data import Subset
from torchmetrics.classification import MulticlassAccuracy

from tda_lightning import GradientRecorder, HDF5Store, Identity, attribute
from tda_lightning.attribution import Averaged
from tda_lightning.passes.batch_contents import batch_size
from tda_lightning.passes.queries import record_queries
from tda_lightning.stores import MemoryStore


def record(model, **settings):
    store, log = MemoryStore(), TrainingLog()
    quiet_trainer(GradientRecorder(store, **settings), log).fit(model, loader(vectors()))
    return store, log


def at_weights(model, weights):
    model.load_state_dict(weights)
    return model


@pytest.mark.parametrize("settings", [{}, {"projector": Identity()}], ids=["default", "identity"])
def test_a_batch_has_the_same_rows_in_training_and_as_queries(settings):
    model = Plain(mlp())
    store, log = record(model, **settings)
    for step, weights, batch in zip(store, log.weights, log.batches, strict=True):
        rows = record_queries(at_weights(model, weights), batch, like=store, at="model")
        torch.testing.assert_close(rows, step.sketch / step.weights[:, None])


def test_queries_of_a_summed_loss_are_not_scaled():
    def summed(outputs, labels):
        return nn.functional.cross_entropy(outputs, labels, reduction="sum")

    model = Plain(mlp(), loss=summed, optimizer=lambda p: torch.optim.SGD(p, lr=1e-4))
    store, log = record(model, reduction="sum")
    rows = record_queries(at_weights(model, log.weights[0]), log.batches[0], like=store, at="model")
    torch.testing.assert_close(rows, store[0].sketch)


def test_a_loader_of_queries_has_the_rows_of_its_batches():
    model = Plain(mlp())
    store, _ = record(model)
    whole = record_queries(model, vectors()[:], like=store)
    parts = record_queries(model, loader(vectors(), shuffle=False), like=store, progress=False)
    torch.testing.assert_close(parts, whole)


class StatefulModel(Plain):
    """Log, update a metric, use random numbers and batch statistics in the training step."""

    def __init__(self):
        super().__init__(
            nn.Sequential(nn.Linear(7, 5), nn.BatchNorm1d(5), nn.Dropout(), nn.Linear(5, 3))
        )
        self.accuracy = MulticlassAccuracy(3)

    def training_step(self, batch, batch_idx):
        x, y = batch
        outputs = self.net(x + torch.rand_like(x))
        self.accuracy(outputs, y)
        self.log_dict({"accuracy": self.accuracy, "loss": outputs.mean()})
        return {"loss": self.loss(outputs, y), "outputs": outputs.detach()}


@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.filterwarnings("ignore:GradientRecorder. not recorded. Linear `net.0.bias`.*no effect")
def test_recording_queries_preserves_the_state_of_the_model(mode):
    model = StatefulModel()
    store, _ = record(model)
    model.net.train()
    model.net[2].eval()
    model.net[0].weight.grad = torch.ones(5, 7)
    before = {
        "state": {k: v.clone() for k, v in model.state_dict().items()},
        "modes": [m.training for m in model.modules()],
        "random": torch.get_rng_state(),
        "count": model.accuracy._update_count,
        "counted": model.accuracy.tp.clone()
        if isinstance(model.accuracy.tp, torch.Tensor)
        else None,
    }
    record_queries(model, vectors()[:5], like=store, mode=mode)
    assert all(torch.equal(v, before["state"][k]) for k, v in model.state_dict().items())
    assert [m.training for m in model.modules()] == before["modes"]
    assert torch.equal(torch.get_rng_state(), before["random"])
    assert model.accuracy._update_count == before["count"]
    assert torch.equal(model.accuracy.tp, before["counted"])
    assert torch.equal(model.net[0].weight.grad, torch.ones(5, 7))
    assert "log" not in vars(model)
    assert not any(m._forward_hooks for m in model.modules())


class WithAverage(Plain):
    """Follows an average of the weights in its training step, and scales a trained weight."""

    def __init__(self, follow):
        super().__init__(mlp())
        self.average, self.follow = mlp().requires_grad_(False), follow

    def training_step(self, batch, batch_idx):
        with torch.no_grad():
            for average, weight in zip(
                self.average.parameters(), self.net.parameters(), strict=True
            ):
                self.follow(average, weight)
            self.net[0].weight.mul_(0.9)
            targets = self.average(batch[0])
        return nn.functional.mse_loss(self.net(batch[0]), targets)


def in_place(average, weight):
    average.lerp_(weight, 0.1)


def through_data(average, weight):
    average.data.mul_(0.9).add_(weight.data, alpha=0.1)


def by_new_data(average, weight):
    average.data = 0.9 * average.data + 0.1 * weight.data


@pytest.mark.parametrize("follow", [in_place, through_data, by_new_data])
def test_weights_that_the_training_step_changes_are_restored_after_queries(follow):
    model = WithAverage(follow)
    store, _ = record(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    places = [parameter.data_ptr() for parameter in model.parameters()]
    record_queries(model, vectors()[:5], like=store)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [parameter.data_ptr() for parameter in model.parameters()] == places


@pytest.mark.filterwarnings("ignore:GradientRecorder. not recorded. Linear `net.0.bias`.*no effect")
def test_the_mode_of_the_model_changes_the_rows():
    model = StatefulModel()
    store, _ = record(model)
    torch.manual_seed(0)
    rows = {m: record_queries(model, vectors()[:5], like=store, mode=m) for m in ("eval", "train")}
    assert not torch.allclose(rows["eval"], rows["train"])


def test_queries_work_on_a_model_without_a_trainer():
    model = Plain(mlp())
    store, _ = record(model)
    other = Plain(mlp())
    other.load_state_dict(model.state_dict())
    scores = attribute(store, other, vectors()[:3], progress=False)
    torch.testing.assert_close(
        scores.values, attribute(store, model, vectors()[:3], progress=False).values
    )
    assert scores.values.shape == (3, 13)
    assert scores.method == repr(Averaged())


def test_queries_call_the_module_hooks_on_batches():
    class Doubling(Plain):
        def on_after_batch_transfer(self, batch, dataloader_idx):
            return 2 * batch[0], batch[1]

    model, plain = Doubling(mlp()), Plain(mlp())
    store, log = record(model)
    x, y = vectors()[:5]
    for module in (model, plain):
        module.load_state_dict(log.weights[0])
    doubled = record_queries(model, (x, y), like=store, at="model")
    expected = record_queries(plain, (2 * x, y), like=store, at="model")
    torch.testing.assert_close(doubled, expected)


class NoLoss(Plain):
    result = None

    def training_step(self, batch, batch_idx):
        super().training_step(batch, batch_idx)
        return self.result


@pytest.mark.parametrize(
    "result", [None, {"accuracy": 1.0}, torch.ones(3), torch.tensor(1.0)], ids=repr
)
def test_a_training_step_without_a_loss_is_refused(result):
    model = NoLoss(mlp())
    store, _ = record(Plain(mlp()))
    model.result = result
    with pytest.raises(ValueError, match=r"NoLoss.training_step.*expected the loss"):
        attribute(store, model, vectors()[:3], progress=False)


@pytest.mark.parametrize(
    ("queries", "message"),
    [
        ((torch.ones(3, 5), torch.zeros(3).long()), r"shape \(3, 5\).*shapes cannot be multiplied"),
        (torch.ones(3, 7), r"got a tensor of shape \(3, 7\)"),
        ((torch.ones(3, 7), torch.zeros(2).long()), r"\(3, 7\).*\(2,\)"),
        ((torch.ones(7), torch.tensor(0)), r"each of the 7 samples.*add the axis .* `x\[None\]`"),
        ("what?", "holds no tensor"),
        ({"x": torch.tensor(1.0)}, "holds no tensor with samples"),
    ],
    ids=["wrong width", "no labels", "too few labels", "no batch axis", "text", "scalar"],
)
def test_queries_of_the_wrong_shape_are_refused(queries, message):
    model = Plain(mlp())
    store, _ = record(model)
    with pytest.raises(ValueError, match=message):
        attribute(store, model, queries, progress=False)


def test_an_empty_loader_is_refused():
    model = Plain(mlp())
    store, _ = record(model)
    with pytest.raises(ValueError, match="empty loader"):
        attribute(store, model, loader(Subset(vectors(), []), shuffle=False), progress=False)


def test_a_model_that_was_frozen_after_training_is_queried_as_if_it_was_not():
    model = Plain(mlp())
    recorder = GradientRecorder(MemoryStore())
    quiet_trainer(recorder).fit(model, loader(vectors()))
    queries = vectors(5).tensors
    expected = attribute(recorder.store, model, queries, progress=False).values
    model.freeze()
    values = attribute(recorder.store, model, queries, progress=False).values
    assert torch.equal(values, expected)
    assert not any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize(
    ("net", "message"),
    [
        (
            nn.Sequential(nn.Linear(7, 3)),
            "`net.2.weight` is missing; `net.2.bias` is missing; `net.3.weight` is missing",
        ),
        (nn.Sequential(*mlp(), nn.Linear(3, 3)), "`net.4.weight` is new; `net.4.bias` is new"),
        (
            mlp(classes=5),
            r"`net.3.weight` was recorded as Linear of 3 x 11 and is now Linear of 5 x 11; "
            r"`net.3.bias` was recorded as Linear of 3 x 1 and is now Linear of 5 x 1",
        ),
    ],
    ids=["other layers", "extra layer", "other shape"],
)
def test_another_model_is_refused(net, message):
    store, _ = record(Plain(mlp()))
    with pytest.raises(ValueError, match=message):
        attribute(store, Plain(net), vectors()[:3], progress=False)


def test_an_empty_run_is_refused(tmp_path):
    model = Plain(mlp())
    store, _ = record(model)
    empty = HDF5Store(tmp_path / "run")
    empty.begin(store.recipe)
    with pytest.raises(ValueError, match=r"at `.*run` has no step yet"):
        attribute(tmp_path / "run", model, vectors()[:3])
    with pytest.raises(FileNotFoundError, match="There is no run at"):
        attribute(tmp_path / "elsewhere", model, vectors()[:3])


def test_a_model_without_trained_parameters_is_refused_before_the_first_batch():
    class Untrained(Plain):
        def configure_optimizers(self):
            return torch.optim.SGD([nn.Parameter(torch.ones(3))], lr=0.1)

    log = TrainingLog()
    trainer = quiet_trainer(GradientRecorder(MemoryStore()), log)
    message = r"nothing that can be recorded: expected at least one trained parameter; got.*`net.0`"
    with pytest.raises(ValueError, match=message):
        trainer.fit(Untrained(mlp()), loader(vectors()))
    assert not log.batches


def test_parameters_of_the_module_itself_can_be_queried():
    class Scaled(Plain):
        def __init__(self):
            super().__init__(mlp().requires_grad_(False))
            self.scale = nn.Parameter(torch.ones(7))

        def training_step(self, batch, batch_idx):
            return super().training_step((batch[0] * self.scale, batch[1]), batch_idx)

    model = Scaled()
    store, log = record(model, projector=Identity())
    for step, weights, batch in zip(store, log.weights, log.batches, strict=True):
        rows = record_queries(at_weights(model, weights), batch, like=store, at="model")
        torch.testing.assert_close(rows, step.sketch / step.weights[:, None])
    assert [(block.name, block.modules) for block in store.recipe.blocks] == [("scale", ("",))]


@pytest.mark.parametrize(
    ("optimizer", "message"),
    [
        (lambda p: torch.optim.LBFGS(p), "LBFGS"),
        (
            lambda p: torch.optim.SGD(
                [{"params": [weight], "lr": 0.1 * (1 + i)} for i, weight in enumerate(p)]
            ),
            "learning rates",
        ),
    ],
    ids=["LBFGS", "several learning rates"],
)
def test_an_unsupported_optimizer_is_refused_before_the_first_batch(optimizer, message):
    model, log = Plain(mlp(), optimizer=optimizer), TrainingLog()
    recorder = GradientRecorder(MemoryStore(), preconditioner="none")
    trainer = quiet_trainer(recorder, log)
    with pytest.raises(ValueError, match=message):
        trainer.fit(model, loader(vectors()))
    assert not log.batches


def test_a_misspelt_layer_is_named():
    recorder = GradientRecorder(MemoryStore(), layers=["net.head"])
    with pytest.raises(
        ValueError, match=r"`layers` contains `net.head`.*\['net.0', 'net.2', 'net.3'\]"
    ):
        quiet_trainer(recorder).fit(Plain(mlp()), loader(vectors()))


def test_a_run_with_frozen_layers_can_be_queried(tmp_path):
    pl.seed_everything(0, verbose=False)
    net = mlp()
    net[0].requires_grad_(False)
    model = Plain(net)
    store, _ = record(model)
    names = ["net.2.weight", "net.2.bias", "net.3.weight", "net.3.bias"]
    assert [block.name for block in store.recipe.blocks] == names
    assert attribute(store, model, vectors()[:3], progress=False).values.abs().max() > 0


class OtherArgumentNames(Plain):
    def training_step(self, data, number):
        assert number in (0, 1, 2)
        return super().training_step(data, number)


class NoBatchIndex(Plain):
    def training_step(self, data):
        return super().training_step(data, 0)


@pytest.mark.parametrize("model_class", [OtherArgumentNames, NoBatchIndex])
def test_training_step_may_have_any_argument_names(model_class):
    pl.seed_everything(0, verbose=False)
    model = model_class(mlp())
    store, _ = record(model)
    assert attribute(store, model, vectors()[:3], progress=False).values.abs().max() > 0


def test_a_batch_that_is_a_list_of_samples_has_as_many_as_entries():
    def sample(n_boxes):
        return torch.zeros(5, 7), {"boxes": torch.zeros(n_boxes, 4)}

    assert batch_size([sample(1), sample(2), sample(3)], "queries") == 3
    assert batch_size([torch.zeros(5, 7), torch.zeros(5)], "queries") == 5
    assert batch_size([{"x": torch.zeros(5), "y": 1}] * 3, "queries") == 3
    pairs = [(torch.zeros(5), torch.tensor(1))] * 2
    assert batch_size(pairs, "queries", torch.arange(2)) == batch_size(pairs, "queries") == 2
    assert batch_size(pairs[:1], "queries", torch.arange(1)) == 1
    images, targets = zip(sample(1), sample(2), sample(3), strict=True)
    assert batch_size([list(images), list(targets)], "queries") == 3
