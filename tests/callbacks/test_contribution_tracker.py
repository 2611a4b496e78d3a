"""ContributionTracker: exact sums over steps, in an unchanged training."""

import csv
import warnings
from pathlib import Path

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from lightning_models import IndexedVectors, Plain, TrainingLog, loader, mlp, quiet_trainer, vectors
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.loggers import CSVLogger
from resumption import EpochSampler, InterruptAt, ResumeSampler
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from tda_lightning import ContributionTracker, CountSketch, GradientRecorder, Identity, TracIn
from tda_lightning.passes.queries import record_queries
from tda_lightning.results import Contributions
from tda_lightning.stores import MemoryStore


def double_vectors(n=13):
    x, y = vectors(n).tensors
    return TensorDataset(x.double(), y)


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.1)


class SettingsLog(TrainingLog):
    """Also store learning rates, clipping factors, and the number of batches before each step."""

    def __init__(self):
        super().__init__()
        self.rates, self.clipped, self.steps = [], [], []

    def on_before_optimizer_step(self, trainer, module, optimizer):
        super().on_before_optimizer_step(trainer, module, optimizer)
        self.rates.append(optimizer.param_groups[0]["lr"])
        self.steps.append(len(self.batches))

    def on_train_batch_end(self, trainer, module, outputs, batch, index):
        if len(self.clipped) < len(self.rates):
            after = torch.cat([p.grad.flatten() for p in module.parameters()])
            before = torch.cat([g.flatten() for g in self.gradients[-1].values()])
            self.clipped.append(float(after @ before / before.square().sum()))


def gradients(model, weights, batch):
    """Return the gradient of each sample's loss as rows, by ``vmap``."""
    net = {name.removeprefix("net."): value for name, value in weights.items()}

    def loss(w, x, y):
        return functional.cross_entropy(functional_call(model.net, w, (x[None],)), y[None])

    result = vmap(grad(loss), in_dims=(None, 0, 0))(net, *batch)
    return torch.cat([gradient.flatten(1) for gradient in result.values()], dim=1)


def exact(model, log, data, probe, stride, accumulate):
    """Sum learning rate times products of gradients over steps, from the definition."""
    x, _ = data.tensors
    total = torch.zeros(len(probe), len(x), dtype=torch.float64)
    first = 0
    for number, last in enumerate(log.steps):
        batches, weights = log.batches[first:last], log.weights[last - 1]
        first = last
        if number % stride:
            continue
        query_gradients = gradients(model, weights, probe.tensors)
        for batch in batches:
            ids = [int((x == sample).all(dim=1).nonzero()) for sample in batch[0]]
            factor = log.rates[number] * log.clipped[number] * stride / len(ids) / accumulate
            total[:, ids] += factor * query_gradients @ gradients(model, weights, batch).mT
    return total


SETTINGS = {
    "plain": ({}, {}),
    "stride": ({"every_n_steps": 2}, {"max_epochs": 3}),
    "accumulation": ({}, {"accumulate_grad_batches": 2}),
    "clipping": ({}, {"gradient_clip_val": 0.05}),
    "clipping by value": (
        {},
        {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"},
    ),
    "all": ({"every_n_steps": 2}, {"accumulate_grad_batches": 3, "gradient_clip_val": 0.05}),
    "steps": ({"period": 2}, {}),
    "run": ({"period": "run"}, {}),
}


@pytest.mark.filterwarnings("ignore:tda_lightning. clipping by value has changed")
@pytest.mark.parametrize("name", SETTINGS)
def test_contributions_are_the_sums_of_exact_gradient_products(name, tmp_path):
    arguments, settings = SETTINGS[name]
    data, probe, log = double_vectors(), double_vectors(18), SettingsLog()
    probe = TensorDataset(*probe[13:])
    # Two batches of different sizes.
    tracker = ContributionTracker(
        loader(probe, 3, shuffle=False), tmp_path / "probe.npz", **arguments
    )
    model = Plain(mlp().double(), optimizer=sgd)
    trainer = quiet_trainer(tracker, log, precision="64-true", **settings)
    trainer.fit(model, loader(data))
    stride, accumulate = arguments.get("every_n_steps", 1), trainer.accumulate_grad_batches
    expected = exact(model, log, data, probe, stride, accumulate)
    assert expected.abs().max() > 1e-4
    torch.testing.assert_close(tracker.scores.values, expected, rtol=1e-8, atol=1e-12)
    assert tracker.scores.train_ids.tolist() == [*range(13)]
    stored = ContributionTracker.load(tmp_path / "probe.npz")
    assert torch.equal(stored.values, tracker.scores.values)
    # With a stride, an epoch may have no tracked step.
    times = {"steps": [0, 2, 4], "run": [0], "all": [0]}.get(name, [*range(trainer.max_epochs)])
    assert Contributions.load(tmp_path / "probe.npz").times.tolist() == times


def test_contributions_predict_the_loss_of_small_steps(tmp_path):
    data, probe = double_vectors(), double_vectors(18)[13:]
    model = Plain(mlp().double(), optimizer=lambda p: torch.optim.SGD(p, lr=1e-4))

    def losses():
        with torch.no_grad():
            return functional.cross_entropy(model.net(probe[0]), probe[1], reduction="none")

    before = losses()
    tracker = ContributionTracker(probe, tmp_path / "probe.npz")
    quiet_trainer(tracker, precision="64-true").fit(model, loader(data))
    predicted = tracker.scores.values.sum(dim=1)
    torch.testing.assert_close(predicted, before - losses(), rtol=5e-3, atol=1e-9)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_under_adam_contributions_are_those_of_tracin_at_the_weights_of_each_step(
    accumulate, tmp_path
):
    store, log, probe = MemoryStore(), TrainingLog(), double_vectors(18)[13:]
    tracker = ContributionTracker(probe, tmp_path / "probe.npz")
    model = Plain(mlp().double(), optimizer=lambda p: torch.optim.Adam(p, lr=0.01))
    settings = {"accumulate_grad_batches": accumulate, "precision": "64-true", "max_epochs": 9}
    recorder = GradientRecorder(store, projector=Identity())
    quiet_trainer(tracker, recorder, log, **settings).fit(model, loader(double_vectors()))
    total = torch.zeros_like(tracker.scores.values)
    n_batches = 0
    for position, step in enumerate(store):
        model.load_state_dict(log.weights[n_batches])
        n_batches += accumulate if len(step.sample_ids) > 5 else 1
        rows = record_queries(model, probe, like=store, at=position)
        total += TracIn().attribute(store[position : position + 1], rows).values
    assert n_batches == len(log.weights)
    torch.testing.assert_close(tracker.scores.values, total, rtol=1e-8, atol=1e-12)


class Stochastic(Plain):
    """Draw random numbers, and keep batch statistics."""

    def __init__(self, optimizer):
        net = nn.Sequential(mlp(), nn.BatchNorm1d(3), nn.Dropout(0.2))
        super().__init__(net, optimizer=optimizer)

    def training_step(self, batch, batch_idx):
        # Not Python's `random`, which the runtime type checks use.
        noise = float(np.random.rand()) + torch.rand(())
        self.log("noise", noise)
        return self.loss(self.net(batch[0] + 0.1 * noise), batch[1])


def train(optimizer, *callbacks, workers=0, model=Stochastic, **settings):
    pl.seed_everything(5, verbose=False)
    trained = model(optimizer)
    extra = {"num_workers": workers, "persistent_workers": workers > 0}
    quiet_trainer(*callbacks, **settings).fit(trained, loader(vectors(), **extra))
    return trained


# The last bias of the network acts through a batch norm.
@pytest.mark.filterwarnings("ignore:ContributionTracker. not recorded. Linear `net.0.3.bias`")
@pytest.mark.parametrize(
    ("settings", "mode"),
    [
        ({}, "eval"),
        ({"workers": 2}, "train"),
        ({"accumulate_grad_batches": 2}, "eval"),
        ({"gradient_clip_val": 0.05}, "train"),
        ({"precision": "bf16-mixed", "model": lambda o: Plain(mlp(), optimizer=o)}, "eval"),
        ({"precision": "bf16-true", "model": lambda o: Plain(mlp(), optimizer=o)}, "eval"),
        ({"max_steps": 3}, "eval"),
    ],
    ids=lambda case: case if isinstance(case, str) else ", ".join(case) or "defaults",
)
def test_training_is_bit_identical_with_the_tracker(settings, mode, tmp_path):
    def adamw(parameters):
        return torch.optim.AdamW(parameters, lr=0.01)

    probe = loader(vectors(18), 7, shuffle=False, num_workers=settings.get("workers", 0))
    tracker = ContributionTracker(probe, tmp_path / "probe.npz", mode=mode)
    plain, tracked = train(adamw, **settings), train(adamw, tracker, **settings)
    for name, value in plain.state_dict().items():
        assert torch.equal(value, tracked.state_dict()[name]), name
    for expected, weight in zip(plain.parameters(), tracked.parameters(), strict=True):
        assert torch.equal(weight.grad, expected.grad)
    assert tracker.scores.values.shape == (18, 13)
    assert tracker.scores.values.abs().sum() > 0


def test_recorder_and_tracker_together_give_the_results_of_each_alone(tmp_path):
    def tracker(name):
        return ContributionTracker(vectors(18)[13:], tmp_path / f"{name}.npz")

    def adam(parameters):
        return torch.optim.Adam(parameters, lr=0.01)

    def run(*callbacks):
        train(
            adam, *callbacks, accumulate_grad_batches=2, model=lambda o: Plain(mlp(), optimizer=o)
        )

    def recorder():
        return GradientRecorder(MemoryStore(), projector=Identity(), curvature="fisher")

    recorders = [recorder() for _ in range(3)]
    trackers = [tracker(name) for name in "abc"]
    run(recorders[0])
    run(trackers[0])
    run(recorders[1], trackers[1])
    run(trackers[2], recorders[2])
    for number in (1, 2):
        torch.testing.assert_close(trackers[number].scores.values, trackers[0].scores.values)
        for expected, step in zip(recorders[0].store, recorders[number].store, strict=True):
            torch.testing.assert_close(step.sketch, expected.sketch)
            torch.testing.assert_close(step.curvature_rows, expected.curvature_rows)


def test_a_step_that_the_model_skips_contributes_nothing(tmp_path):
    class SkipsStep(Plain):
        def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure):
            if batch_idx == 1:
                optimizer_closure()
            else:
                optimizer.step(closure=optimizer_closure)

    tracker = ContributionTracker(vectors()[:3], tmp_path / "probe.npz")
    quiet_trainer(tracker).fit(SkipsStep(mlp()), loader(vectors(), shuffle=False))
    assert (tracker.scores.values != 0).any(dim=0).tolist() == [True] * 5 + [False] * 5 + [True] * 3


def test_a_failure_removes_all_hooks_and_writes_the_contributions(tmp_path):
    class Fails(Plain):
        def training_step(self, batch, batch_idx):
            if self.trainer.current_epoch == 1:
                raise RuntimeError("on purpose")
            return super().training_step(batch, batch_idx)

    model, data = Fails(mlp()), loader(vectors())
    before = data.batch_sampler
    trainer = quiet_trainer(ContributionTracker(vectors()[:3], tmp_path / "probe.npz"))
    with pytest.raises(RuntimeError, match="on purpose"):
        trainer.fit(model, data)
    assert data.batch_sampler is before
    assert not any(module._forward_hooks for module in model.modules())
    assert "process_dataloader" not in vars(trainer.strategy)
    assert "log" not in vars(model)
    assert ContributionTracker.load(tmp_path / "probe.npz").values.shape == (3, 13)
    assert [file.name for file in tmp_path.iterdir()] == ["probe.npz"]


def test_curves_go_to_the_logger(tmp_path):
    tracker = ContributionTracker(vectors()[:3], tmp_path / "held-out.npz", every_n_steps=2)
    logger = CSVLogger(tmp_path)
    trainer = quiet_trainer(tracker, logger=logger, log_every_n_steps=1)
    trainer.fit(Plain(mlp()), loader(vectors()))
    file = Path(logger.experiment.metrics_file_path)
    rows = list(csv.DictReader(file.read_text().splitlines()))
    tracked = [row for row in rows if row["held-out/decrease"]]
    assert [row["step"] for row in tracked] == ["0", "2", "4"]
    logged = [{k: float(v) for k, v in row.items() if k.startswith("held-out")} for row in tracked]
    total = 2 * sum(row["held-out/decrease"] for row in logged)
    assert total == pytest.approx(float(tracker.scores.values.sum(dim=1).mean()), rel=1e-5)
    assert all(0 <= row["held-out/negative_share"] <= 1 for row in logged)
    assert all(row["held-out/loss"] > 0 for row in logged)


def test_a_trajectory_shows_when_a_sample_helped(tmp_path):
    tracker = ContributionTracker(vectors()[:3], tmp_path / "probe.npz")
    quiet_trainer(tracker, max_epochs=3).fit(Plain(mlp()), loader(vectors()))
    trajectory = tracker.contributions.trajectory([11, 2])
    assert trajectory.values.shape == (3, 2, 3)
    assert trajectory.per == "epoch"
    torch.testing.assert_close(trajectory.total(), tracker.scores.values[:, [11, 2]])
    with pytest.raises(ValueError, match="Sample 99 is not among"):
        tracker.contributions.trajectory([99])


def test_ids_of_a_user_function_are_stored_as_they_appear(tmp_path):
    tracker = ContributionTracker(
        vectors()[:5], tmp_path / "probe.npz", sample_ids=lambda batch: 100 * batch[1]
    )
    quiet_trainer(tracker).fit(Plain(mlp()), loader(vectors(), shuffle=False))
    by_index = ContributionTracker(vectors()[:5], tmp_path / "other.npz")
    quiet_trainer(by_index).fit(Plain(mlp()), loader(vectors(), shuffle=False))
    assert tracker.scores.train_ids.tolist() == [0, 100, 200]
    labels = functional.one_hot(vectors().tensors[1], 3).double()
    torch.testing.assert_close(tracker.scores.values, by_index.scores.values @ labels)


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", [sgd, lambda p: torch.optim.Adam(p, lr=0.01)])
def test_a_resumed_training_continues_the_contributions(optimizer, tmp_path):
    def run(name, epochs, *callbacks, **arguments):
        data = loader(vectors(), shuffle=False)
        tracker = ContributionTracker(vectors(18)[13:], tmp_path / "probe.npz", **arguments)
        settings = {"max_epochs": epochs, "enable_checkpointing": bool(callbacks)}
        trainer = quiet_trainer(tracker, *callbacks, **settings)
        model = Plain(mlp(), optimizer=optimizer)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*callbacks used to create the checkpoint")
            warnings.filterwarnings("ignore", "You're resuming from a checkpoint that ended")
            trainer.fit(model, data, ckpt_path=name)
        return tracker

    whole = run(None, 9).contributions
    (tmp_path / "probe.npz").unlink()
    # Steps after the checkpoint are dropped.
    saved = ModelCheckpoint(tmp_path, "at", every_n_train_steps=21, save_top_k=1)
    run(None, 8, saved)
    resumed = run(tmp_path / "at.ckpt", 9).contributions
    torch.testing.assert_close(resumed.values, whole.values)
    assert resumed.provenance["steps"] == "27"


MID_EPOCH = {
    "plain": ({}, {}),
    "stride and periods of two": ({"every_n_steps": 2, "period": 2}, {}),
    "accumulation": ({"period": "run"}, {"accumulate_grad_batches": 2}),
    "ids of a user function": ({"sample_ids": lambda batch: 100 + batch[0][:, 0].long()}, {}),
    "clipping": ({"mode": "train"}, {"gradient_clip_val": 0.05}),
}


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before")
@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
@pytest.mark.parametrize("optimizer", [sgd, lambda p: torch.optim.Adam(p, lr=0.01)])
@pytest.mark.parametrize(
    "name", ["plain", *(pytest.param(name, marks=pytest.mark.slow) for name in list(MID_EPOCH)[1:])]
)
def test_an_interruption_in_mid_epoch_does_not_change_the_table(name, optimizer, tmp_path):
    arguments, settings = MID_EPOCH[name]

    def run(folder, until=None, resume=None):
        sampler = EpochSampler(13, 2)
        tracker = ContributionTracker(vectors(18)[13:], folder / "probe.npz", **arguments)
        saver = ModelCheckpoint(folder, "{step}", every_n_train_steps=3, save_top_k=-1)
        callbacks = [
            tracker,
            saver,
            ResumeSampler(sampler),
            *([InterruptAt(until)] if until else []),
        ]
        trainer = quiet_trainer(*callbacks, max_epochs=4, enable_checkpointing=True, **settings)
        data = DataLoader(IndexedVectors(), batch_size=2, sampler=sampler)
        trainer.fit(Plain(mlp(), optimizer=optimizer), data, ckpt_path=resume)
        return tracker

    whole = run(tmp_path / "whole").contributions
    parts, resume = tmp_path / "parts", None
    for save, until in ((3, 5), (9, 10), (15, 16)):
        with pytest.raises(RuntimeError, match="interrupted"):
            run(parts, until, resume)
        resume = parts / f"step={save}.ckpt"
    resumed = run(parts, resume=resume).contributions
    torch.testing.assert_close(resumed.values, whole.values, rtol=0, atol=0)
    assert torch.equal(resumed.times, whole.times)
    assert torch.equal(resumed.train_ids, whole.train_ids)
    assert resumed.provenance == whole.provenance
    assert torch.equal(Contributions.load(parts / "probe.npz").values, whole.values)


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"period": 2}, r"`period` was 'epoch' .* is now '2 steps'.*Restore it"),
        ({"every_n_steps": 2}, r"`every_n_steps` was '1' .* is now '2'"),
        ({"mode": "train"}, r"`mode` was 'eval' .* is now 'train'"),
        ({"projector": CountSketch(53)}, r"`projector` was 'name=Identity' .* is now 'name=Count"),
        ({"probe": vectors()[:3]}, r"contributions to 5 probes, and `probe` has 3"),
    ],
    ids=["period", "stride", "mode", "projector", "probe"],
)
def test_a_tracker_with_other_settings_does_not_resume(changed, message, tmp_path):
    def run(resume=None, **arguments):
        arguments = {"probe": vectors()[:5], "store": tmp_path / "probe.npz", **arguments}
        tracker = ContributionTracker(**arguments)
        saver = ModelCheckpoint(tmp_path, "at", every_n_train_steps=3)
        epochs = 2 if resume else 1
        trainer = quiet_trainer(tracker, saver, enable_checkpointing=True, max_epochs=epochs)
        trainer.fit(Plain(mlp()), loader(vectors()), ckpt_path=resume)

    run()
    content = (tmp_path / "probe.npz").read_bytes()
    with pytest.raises(ValueError, match=message):
        run(tmp_path / "at.ckpt", **changed)
    assert (tmp_path / "probe.npz").read_bytes() == content


def test_a_second_fit_continues_the_contributions(tmp_path):
    tracker, model, data = (
        ContributionTracker(vectors(18)[13:], tmp_path / "probe.npz"),
        Plain(mlp()),
        loader(vectors(), shuffle=False),
    )
    trainer = quiet_trainer(tracker, max_epochs=1)
    trainer.fit(model, data)
    first = tracker.contributions.values
    trainer.fit_loop.max_epochs = 2
    trainer.fit(model, data)
    assert torch.equal(tracker.contributions.values[:1], first)
    assert tracker.contributions.times.tolist() == [0, 1]


def test_large_models_are_sketched_with_a_warning(tmp_path, monkeypatch):
    monkeypatch.setattr("tda_lightning.callbacks.tracking.tracked_training._MAX_NUMBERS", 100)
    tracker = ContributionTracker(vectors()[:3], tmp_path / "probe.npz")
    with pytest.warns(UserWarning, match="products are estimated from sketches"):
        quiet_trainer(tracker).fit(Plain(mlp()), loader(vectors()))
    assert "KroneckerCountSketch" in tracker.scores.provenance["projector"]


def assert_refused(match, tmp_path, probe=None, model=None, error=ValueError, **settings):
    tracker = ContributionTracker(vectors()[:3] if probe is None else probe, tmp_path / "probe.npz")
    with pytest.raises(error, match=match):
        quiet_trainer(tracker, **settings).fit(model or Plain(mlp()), loader(vectors()))


def test_unsupported_trainings_are_refused_before_the_first_batch(tmp_path):
    class Manual(Plain):
        def __init__(self):
            super().__init__(mlp())
            self.automatic_optimization = False

    assert_refused("manual optimization", tmp_path, model=Manual())
    assert_refused("shuffled loader", tmp_path, probe=loader(vectors()))
    empty = loader(TensorDataset(torch.zeros(0, 7)), shuffle=False)
    assert_refused("empty loader", tmp_path, probe=empty)
    (tmp_path / "probe.npz").touch()
    assert_refused("exists already", tmp_path, error=FileExistsError)
    with pytest.raises(ValueError, match="`every_n_steps` is 0"):
        ContributionTracker(None, tmp_path / "probe.npz", every_n_steps=0)
    with pytest.raises(ValueError, match="Nothing has been tracked yet"):
        _ = ContributionTracker(None, tmp_path / "probe.npz").scores


class TwoEvaluations(torch.optim.SGD):
    """Evaluate the closure twice, as sharpness-aware minimisation does."""

    def step(self, closure=None):
        with torch.enable_grad():
            closure()
        return super().step(closure)


def test_a_second_evaluation_of_the_loss_raises(tmp_path):
    model = Plain(mlp(), optimizer=lambda p: TwoEvaluations(p, lr=0.1))
    assert_refused("evaluates the loss more than once per step", tmp_path, model=model)


def test_of_a_layer_that_is_trained_in_part_the_trained_part_contributes(tmp_path):
    class WeightsOnly(Plain):
        def configure_optimizers(self):
            return torch.optim.SGD([p for p in self.parameters() if p.ndim == 2], lr=0.1)

    class FrozenVectors(WeightsOnly):
        def __init__(self, net):
            super().__init__(net)
            for parameter in net.parameters():
                parameter.requires_grad_(parameter.ndim == 2)

    def scores(model):
        torch.manual_seed(0)
        tracker = ContributionTracker(double_vectors(18)[13:], tmp_path / f"{type(model).__name__}")
        quiet_trainer(tracker, precision="64-true").fit(model, loader(double_vectors()))
        return tracker.scores.values

    expected = scores(FrozenVectors(mlp().double()))
    with pytest.warns(UserWarning, match="not recorded") as caught:
        actual = scores(WeightsOnly(mlp().double()))
    assert [
        str(w.message).partition(":")[2] for w in caught if "not recorded" in str(w.message)
    ] == [
        f" not recorded: {layer} ({size} parameters): its parameters are in no optimizer"
        for layer, size in (
            ("Linear `net.0`", 11),
            ("LayerNorm `net.2`", 22),
            ("Linear `net.3`", 3),
        )
    ]
    torch.testing.assert_close(actual, expected)
