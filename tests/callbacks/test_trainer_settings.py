"""The rows of a step sum to the optimizer's gradient under all loop and precision settings."""

from itertools import chain

import pytest
import pytorch_lightning as pl
import torch
from lightning_models import (
    IndexedVectors,
    Plain,
    TrainingLog,
    loader,
    mlp,
    quiet_trainer,
    vectors,
)
from loss_scale import Scripted, ScriptedScaler
from pytorch_lightning.callbacks import BaseFinetuning, GradientAccumulationScheduler
from pytorch_lightning.strategies import SingleDeviceStrategy

from tda_lightning import GradientRecorder, HDF5Store, Identity, attribute
from tda_lightning.stores import MemoryStore

BATCHES = 3  # 13 samples in batches of five


pytestmark = [
    pytest.mark.filterwarnings("ignore:You passed in a .val_dataloader. but have no"),
    pytest.mark.filterwarnings("ignore:You are trying to .self.log... but .Trainer.barebones"),
]


class Validated(Plain):
    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.loss(self.net(batch[0]), batch[1]))


def record(*callbacks, model=None, data=None, every_n_steps=1, **settings):
    """Train, and return the store and the ids of every batch that the dataset delivered."""
    store, log = MemoryStore(), TrainingLog()
    recorder = GradientRecorder(
        store, projector=Identity(), preconditioner="none", audit=1, every_n_steps=every_n_steps
    )
    trainer = quiet_trainer(recorder, log, *callbacks, **settings)
    data = data or loader(IndexedVectors())
    trainer.fit(model or Validated(mlp()), data, loader(IndexedVectors(), shuffle=False))
    return store, [batch[0][:, 0].long().tolist() for batch in log.batches]


def flat(lists):
    return list(chain.from_iterable(lists))


def assert_explained(store, least=0.9999):
    """Assert that the rows of every step sum to the gradient that its optimizer used."""
    assert len(store.audits()) == len(store)
    assert all(float(audit.explained().min()) > least for audit in store.audits())


@pytest.mark.parametrize(
    ("settings", "steps"),
    [
        ({}, 6),
        ({"limit_train_batches": 2}, 4),
        ({"val_check_interval": 2}, 6),
        ({"val_check_interval": 0.5, "check_val_every_n_epoch": 2}, 6),
        ({"num_sanity_val_steps": 2}, 6),
        ({"max_steps": 4}, 4),
        ({"max_time": {"hours": 1}}, 6),
        ({"reload_dataloaders_every_n_epochs": 1}, 6),
        ({"gradient_clip_val": 0.05}, 6),
        ({"fast_dev_run": 2, "max_epochs": 1}, 2),
        ({"barebones": True, "enable_checkpointing": None, "logger": None}, 6),
        ({"detect_anomaly": True}, 6),
        ({"precision": "64-true"}, 6),
        ({"inference_mode": False}, 6),
    ],
    ids=str,
)
def test_loops_record_every_batch_once(settings, steps):
    barebones = {"enable_progress_bar": None, "enable_model_summary": None}
    settings = {**settings, **(barebones if "barebones" in settings else {})}
    store, ids = record(**settings)
    assert [step.sample_ids.tolist() for step in store] == ids
    assert [step.index for step in store] == list(range(steps))
    assert_explained(store)


@pytest.mark.filterwarnings("ignore:You requested to overfit but enabled train dataloader shuff")
@pytest.mark.filterwarnings("ignore:You requested to overfit but enabled val dataloader shuff")
def test_overfit_batches_records_the_same_batches_again():
    store, ids = record(overfit_batches=2)
    assert [step.sample_ids.tolist() for step in store] == ids == 2 * [[*range(5)], [*range(5, 10)]]
    assert_explained(store)


@pytest.mark.parametrize(
    ("by", "weights"),
    [
        (2, [[1 / 10] * 10, [1 / 6] * 3]),
        (3, [[1 / 15] * 10 + [1 / 9] * 3]),
        (5, [[0.04] * 10 + [1 / 15] * 3]),
    ],
)
def test_the_last_accumulation_of_an_epoch_has_smaller_weights(by, weights):
    """Lightning divides the loss by the full number of batches, even if fewer are left."""
    store, ids = record(accumulate_grad_batches=by)
    assert_explained(store)
    assert flat(step.sample_ids.tolist() for step in store) == flat(ids)
    for step, expected in zip(store, 2 * weights, strict=True):
        assert step.weights.tolist() == pytest.approx(expected)


def test_an_accumulation_schedule_is_recorded():
    schedule = GradientAccumulationScheduler({0: 1, 1: 3})
    store, ids = record(schedule, max_epochs=2)
    assert [len(step.sample_ids) for step in store] == [5, 5, 3, 13]
    assert store[3].sample_ids.tolist() == flat(ids[3:])
    assert store[3].weights.tolist() == pytest.approx([1 / 15] * 10 + [1 / 9] * 3)
    assert_explained(store)


def test_steps_have_the_learning_rate_before_the_scheduler_steps():
    for interval, rates in (("step", [0.5**t for t in range(6)]), ("epoch", [1] * 3 + [0.5] * 3)):

        class Scheduled(Plain):
            interval: str

            def configure_optimizers(self):
                optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
                schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
                settings = {"scheduler": schedule, "interval": self.interval}
                return {"optimizer": optimizer, "lr_scheduler": settings}

        model = Scheduled(mlp())
        model.interval = interval
        store, _ = record(model=model)
        assert [step.lr for step in store] == pytest.approx([0.1 * rate for rate in rates])


def test_a_step_that_the_model_skips_is_not_recorded():
    class SkipsStep(Plain):
        def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure):
            if batch_idx == 1:
                optimizer_closure()
            else:
                optimizer.step(closure=optimizer_closure)

    store, ids = record(model=SkipsStep(mlp()))
    assert [step.sample_ids.tolist() for step in store] == [ids[n] for n in (0, 2, 3, 5)]
    assert_explained(store)


def test_early_stopping_ends_the_run():
    from pytorch_lightning.callbacks import EarlyStopping

    stop = EarlyStopping("val_loss", patience=1, min_delta=1e9)
    store, ids = record(stop, max_epochs=9)
    assert [step.sample_ids.tolist() for step in store] == ids
    assert len(store) == 2 * BATCHES


@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed"])
def test_half_precision_rows_sum_to_the_gradient_to_rounding(precision):
    store, ids = record(precision=precision)
    assert [step.sample_ids.tolist() for step in store] == ids
    assert store.recipe.dtype == "float32"
    assert_explained(store, 0.999)


@pytest.mark.parametrize("accumulate", [1, 3])
def test_the_loss_scale_is_undone_and_skipped_steps_are_not_stored(accumulate):
    overflows = {1, 4} if accumulate == 1 else {1}
    plain, _ = record(accumulate_grad_batches=accumulate, max_epochs=4)
    scaler = ScriptedScaler([2.0**n for n in range(8, 30)], overflows)
    store, ids = record(
        plugins=[Scripted(scaler)], accumulate_grad_batches=accumulate, max_epochs=4
    )
    expected = [n for n in range(12 // accumulate) if n not in overflows]
    assert [step.index for step in store] == expected
    for step in store:
        batches = ids[step.index * accumulate : (step.index + 1) * accumulate]
        assert step.sample_ids.tolist() == flat(batches)
    assert_explained(store)
    torch.testing.assert_close(store[0].weights, plain[0].weights)
    assert float(store[0].sketch.norm()) == pytest.approx(float(plain[0].sketch.norm()), rel=0.5)


BY_VALUE = {"gradient_clip_val": 0.2, "gradient_clip_algorithm": "value"}


@pytest.mark.filterwarnings("ignore:tda_lightning. clipping by value has changed")
@pytest.mark.parametrize("clip", [{}, {"gradient_clip_val": 0.3}, BY_VALUE], ids=str)
def test_rows_do_not_depend_on_the_loss_scale(clip):
    def run(scale):
        torch.manual_seed(0)
        settings = {} if scale is None else {"plugins": [Scripted(ScriptedScaler([scale] * 9, ()))]}
        recorder = GradientRecorder(
            store := MemoryStore(), projector=Identity(), curvature="fisher"
        )
        model = Plain(mlp(), optimizer=lambda p: torch.optim.AdamW(p, lr=0.01))
        trainer = quiet_trainer(recorder, **settings, **clip)
        trainer.fit(model, loader(IndexedVectors(), shuffle=False))
        return store

    for plain, scaled in zip(run(None), run(1024.0), strict=True):
        for name in ("sketch", "weights", "terms", "curvature", "curvature_rows"):
            torch.testing.assert_close(
                getattr(plain, name), getattr(scaled, name), rtol=1e-4, atol=1e-6
            )


def test_a_fused_optimizer_with_a_loss_scale_is_refused():
    def fused(parameters):
        return torch.optim.AdamW(parameters, lr=0.01, fused=True)

    scaler = ScriptedScaler([2.0] * 9, ())
    with pytest.raises(ValueError, match="a fused `AdamW` with a loss scale"):
        record(model=Plain(mlp(), optimizer=fused), plugins=[Scripted(scaler)])


class FSDPStrategy(SingleDeviceStrategy):
    """A strategy with the name of Lightning's, which needs a GPU."""


class MyStrategy(SingleDeviceStrategy):
    """A user's subclass of a supported strategy."""


def test_strategies_that_split_layers_are_refused():
    with pytest.raises(ValueError, match=r"are split.*strategy='ddp'"):
        record(strategy=FSDPStrategy(torch.device("cpu")))
    store, _ = record(strategy=MyStrategy(torch.device("cpu")))
    assert len(store) == 6


class ClosureTwice(torch.optim.SGD):
    """Evaluate the closure twice, as sharpness-aware minimisation does."""

    def step(self, closure=None):
        with torch.enable_grad():
            closure()
        return super().step(closure)


@pytest.mark.parametrize(
    ("optimizer", "message"),
    [
        (lambda p: torch.optim.LBFGS(p), "LBFGS"),
        (lambda p: ClosureTwice(p, lr=0.1), "evaluates the loss more than once"),
    ],
    ids=["LBFGS", "twice"],
)
def test_unsupported_optimizers_are_refused(optimizer, message):
    with pytest.raises(ValueError, match=message):
        record(model=Plain(mlp(), optimizer=optimizer))


class Unfreezes(BaseFinetuning):
    """Trains the first layer from the second epoch on, as `BackboneFinetuning` does."""

    def freeze_before_training(self, module):
        self.freeze(module.net[0])

    def finetune_function(self, module, epoch, optimizer):
        if epoch == 1:
            self.unfreeze_and_add_param_group(module.net[0], optimizer, lr=0.1)


class TrainsUnfrozen(Validated):
    def configure_optimizers(self):
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.1)


def test_layers_that_are_unfrozen_later_are_left_out_by_name_and_can_be_queried():
    model = TrainsUnfrozen(mlp())
    with pytest.warns(UserWarning, match="not recorded, since they were not trained when"):
        store, _ = record(Unfreezes(), model=model)
    names = ["net.2.weight", "net.2.bias", "net.3.weight", "net.3.bias"]
    assert [block.name for block in store.recipe.blocks] == names
    assert [entry.name for entry in store.recipe.left_out] == ["net.0.weight", "net.0.bias"]
    shares = [audit.explained_in_all() for audit in store.audits()]
    assert min(shares[:BATCHES]) > 0.9999
    assert max(shares[BATCHES:]) < 0.99
    assert attribute(store, model, vectors()[:2], progress=False).values.any()


@pytest.mark.filterwarnings("ignore:GradientRecorder. 2 parameters of the SGD are not recorded")
@pytest.mark.filterwarnings("ignore:GradientRecorder. not recorded. Linear `net.0")
@pytest.mark.parametrize("epochs", [1, 2])
def test_a_training_that_unfreezes_layers_can_be_resumed(epochs, tmp_path):
    def fit(max_epochs, **settings):
        torch.manual_seed(0)
        model, recorder = TrainsUnfrozen(mlp()), GradientRecorder(tmp_path / "run")
        trainer = quiet_trainer(recorder, Unfreezes(), max_epochs=max_epochs)
        data = loader(IndexedVectors())
        trainer.fit(model, data, data, **settings)
        return trainer

    fit(epochs).save_checkpoint(tmp_path / "epoch.ckpt")
    fit(3, ckpt_path=tmp_path / "epoch.ckpt", weights_only=False)
    run = HDF5Store.open(tmp_path / "run")
    assert [facts.index for facts in run.facts] == list(range(3 * BATCHES))
    assert [entry.name for entry in run.recipe.left_out] == ["net.0.weight", "net.0.bias"]


def test_a_layer_that_is_replaced_later_is_warned_of():
    class Replaces(Plain):
        def on_train_epoch_end(self):
            if self.current_epoch == 0:
                self.net[3] = torch.nn.Linear(11, 3)
                (group,) = self.trainer.optimizers[0].param_groups
                group["params"][-2:] = self.net[3].parameters()

    with pytest.warns(UserWarning, match="2 parameters of the SGD are not recorded"):
        record(model=Replaces(mlp()))


def test_a_layer_that_is_frozen_for_a_while_is_recorded_again():
    class Freezes(Plain):
        def on_train_epoch_start(self):
            self.net[0].requires_grad_(self.current_epoch != 1)

    store, _ = record(model=Freezes(mlp()), max_epochs=3)
    is_zero = [bool((step.sketch[:, :77] == 0).all()) for step in store]
    assert is_zero == [False] * 3 + [True] * 3 + [False] * 3


def test_steps_that_another_trainer_takes_the_hooks_of_are_warned_of():
    """Lightning sends the events of a model's steps to the trainer that it was last given."""

    class FitsAgain(pl.Callback):
        def on_train_epoch_end(self, trainer, module):
            if trainer.current_epoch == 0:
                quiet_trainer(max_epochs=1).fit(module, loader(IndexedVectors()))

    class Silent(Plain):
        def training_step(self, batch, batch_idx):
            return self.loss(self.net(batch[0]), batch[1])

    with pytest.warns(UserWarning, match="the SGD took a step without `on_before_optimizer_step`"):
        store, _ = record(FitsAgain(), model=Silent(mlp()))
    assert len(store) == BATCHES
