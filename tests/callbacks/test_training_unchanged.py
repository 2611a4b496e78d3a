"""The recorder does not change training: bit-identical weights, and no hooks left behind."""

import contextlib
from dataclasses import replace

import lightning.pytorch
import pytest
import pytorch_lightning as pl
import torch
from lightning_models import Plain, TrainingLog, loader, mlp, quiet_trainer, vectors
from torch.utils.data import WeightedRandomSampler

from tda_lightning import CountSketch, GradientRecorder
from tda_lightning.stores import MemoryStore
from tda_lightning.stores.step import ParameterGroup

OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.01),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
}


def train(optimizer, *callbacks, workers=0, **settings):
    pl.seed_everything(5, verbose=False)
    model = Plain(torch.nn.Sequential(mlp(), torch.nn.Dropout(0.2)), optimizer=optimizer)
    extra = {"num_workers": workers, "persistent_workers": workers > 0}
    quiet_trainer(*callbacks, **settings).fit(model, loader(vectors(), **extra))
    return model


def assert_bit_identical(model, expected):
    for weight, expected_weight in zip(model.parameters(), expected.parameters(), strict=True):
        assert torch.equal(weight, expected_weight)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_weights_are_bit_identical_with_the_callback(optimizer, workers):
    plain = train(optimizer, workers=workers)
    recorded = train(optimizer, GradientRecorder(MemoryStore()), workers=workers)
    assert_bit_identical(plain, recorded)


class Losses(pl.Callback):
    """Store the training loss of each batch, to the last bit."""

    def __init__(self):
        self.curve = []

    def on_train_batch_end(self, trainer, module, outputs, batch, index):
        self.curve.append(float(outputs["loss"]))


# Options of the Trainer, of the loader, and of the recorder.
MATRIX = [
    ({}, {}, {"curvature": "fisher"}),
    ({}, {}, {"preconditioner": "none"}),
    ({}, {}, {"every_n_steps": 2, "audit": 1}),
    ({}, {}, {"projector": CountSketch(64)}),
    ({}, {"num_workers": 1, "prefetch_factor": 3}, {}),
    ({}, {"num_workers": 3}, {}),
    ({}, {"num_workers": 2, "persistent_workers": True}, {"curvature": "fisher"}),
    ({}, {"drop_last": True}, {}),
    ({}, {"sampler": WeightedRandomSampler(torch.arange(13.0), 11), "shuffle": None}, {}),
    ({"accumulate_grad_batches": 2}, {}, {}),
    ({"accumulate_grad_batches": 2, "gradient_clip_val": 0.05}, {}, {"curvature": "fisher"}),
    ({"gradient_clip_val": 0.05}, {}, {}),
    ({"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"}, {}, {}),
    ({"limit_train_batches": 2}, {}, {}),
    ({"limit_train_batches": 0.7}, {"num_workers": 2}, {}),
    ({"precision": "bf16-mixed"}, {}, {}),
    ({"precision": "bf16-true"}, {}, {"curvature": "fisher"}),
    ({"precision": "64-true"}, {}, {}),
    ({"max_steps": 3}, {}, {}),
    ({"max_steps": 7, "max_epochs": -1}, {"num_workers": 2}, {}),
    ({"reload_dataloaders_every_n_epochs": 1}, {}, {}),
    ({"val_check_interval": 1, "num_sanity_val_steps": 2}, {}, {}),
    ({"overfit_batches": 2}, {"shuffle": False}, {}),
    ({"fast_dev_run": 2}, {}, {}),
    ({"deterministic": True, "detect_anomaly": True}, {}, {}),
    ({"use_distributed_sampler": False, "num_nodes": 1}, {}, {"layers": ["net.0.*"]}),
]


def _words(settings):
    """Describe the settings by words that are the same in every process."""
    return " ".join(
        f"{name}={value if isinstance(value, int | float | str) else type(value).__name__}"
        for name, value in settings.items()
    )


@pytest.mark.filterwarnings("ignore:You passed in a .val_dataloader. but have no")
@pytest.mark.filterwarnings("ignore:.*shuffling enabled")
@pytest.mark.filterwarnings("ignore:tda_lightning. clipping by value has changed")
@pytest.mark.parametrize(("settings", "loading", "recording"), MATRIX, ids=_words)
def test_weights_and_losses_are_bit_identical_under(settings, loading, recording):
    def run(*callbacks):
        pl.seed_everything(5, verbose=False)
        losses = Losses()
        model = Plain(
            torch.nn.Sequential(mlp(), torch.nn.Dropout(0.2)), optimizer=OPTIMIZERS["AdamW"]
        )
        trainer = quiet_trainer(*callbacks, losses, **{"max_epochs": 3, **settings})
        trainer.fit(model, loader(vectors(), **loading), loader(vectors(), shuffle=False))
        return model, losses.curve, torch.rand(1)

    plain = run()
    recorded = run(GradientRecorder(MemoryStore(), **recording))
    assert_bit_identical(plain[0], recorded[0])
    assert plain[1:] == recorded[1:]
    assert plain[1]


@pytest.mark.parametrize(
    ("trainer_type", "module_type"),
    [
        (pl.Trainer, pl.LightningModule),
        (lightning.pytorch.Trainer, lightning.pytorch.LightningModule),
    ],
    ids=["pytorch_lightning", "lightning.pytorch"],
)
def test_trainers_of_both_packages_record(trainer_type, module_type):
    class Model(module_type):
        def __init__(self):
            super().__init__()
            self.net = mlp()

        def training_step(self, batch, batch_idx):
            return torch.nn.functional.cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    store = MemoryStore()
    trainer = quiet_trainer(GradientRecorder(store), trainer_type=trainer_type)
    trainer.fit(Model(), loader(vectors()))
    assert len(store) == 6


def test_nothing_is_left_behind_on_success_or_failure():
    class Fails(Plain):
        def training_step(self, batch, batch_idx):
            if batch_idx == 2:
                raise RuntimeError("on purpose")
            return super().training_step(batch, batch_idx)

    for model_type, outcome, steps in (
        (Plain, contextlib.nullcontext(), 6),
        (Fails, pytest.raises(RuntimeError, match="on purpose"), 2),
    ):
        model, data, store = model_type(mlp()), loader(vectors()), MemoryStore()
        before = (set(model.state_dict()), data.batch_sampler, type(model))
        trainer = quiet_trainer(GradientRecorder(store))
        with outcome:
            trainer.fit(model, data)
        assert (set(model.state_dict()), data.batch_sampler, type(model)) == before
        assert not any(module._forward_hooks for module in model.modules())
        assert "process_dataloader" not in vars(trainer.strategy)
        assert len(store) == steps


@pytest.mark.filterwarnings("ignore:.*returned `None`")  # Lightning warns once per process.
def test_batches_without_a_loss_are_not_recorded_and_shift_no_ids():
    class SkipsLoss(Plain):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return None if batch_idx == 1 else loss

    store, log = MemoryStore(), TrainingLog()
    quiet_trainer(GradientRecorder(store), log).fit(SkipsLoss(mlp()), loader(vectors()))
    assert [step.index for step in store] == [0, 2, 3, 5]
    assert [len(step.sample_ids) for step in store] == [5, 3, 5, 3]


def test_a_stride_records_whole_steps():
    store = MemoryStore()
    recorder = GradientRecorder(store, every_n_steps=2)
    trainer = quiet_trainer(recorder, accumulate_grad_batches=2, max_epochs=3)
    trainer.fit(Plain(mlp()), loader(vectors()))
    assert [step.index for step in store] == [0, 2, 4]
    assert [len(step.sample_ids) for step in store] == [10, 10, 10]
    with pytest.raises(ValueError, match="`every_n_steps` is 0"):
        GradientRecorder(store, every_n_steps=0)


def test_hyperparameters_are_recorded_before_the_scheduler_steps():
    def optimizer(parameters):
        adamw = torch.optim.AdamW(parameters, lr=0.1, betas=(0.8, 0.95), weight_decay=0.3, eps=1e-6)
        decay = torch.optim.lr_scheduler.LambdaLR(adamw, lambda step: 0.5**step)
        return {"optimizer": adamw, "lr_scheduler": {"scheduler": decay, "interval": "step"}}

    store = MemoryStore()
    model = Plain(mlp())
    model.configure_optimizers = lambda: optimizer(model.parameters())
    quiet_trainer(GradientRecorder(store)).fit(model, loader(vectors()))
    assert [step.lr for step in store] == pytest.approx([0.1 * 0.5**t for t in range(6)])
    (group,) = store[0].groups
    settings = {"lr": 0.1, "beta1": 0.8, "beta2": 0.95, "weight_decay": 0.3, "eps": 1e-6}
    expected = ParameterGroup(**settings, share=1.0, descent=1.0)
    assert replace(group, decoupled=0.0) == expected  # Only newer versions of torch have it.
    assert store[0].optimizer == "AdamW"
    assert [step.epoch for step in store] == [0, 0, 0, 1, 1, 1]


def test_validation_and_sanity_checks_are_not_recorded():
    class Validated(Plain):
        def validation_step(self, batch, batch_idx):
            return self.loss(self.net(batch[0]), batch[1])

    store, data = MemoryStore(), loader(vectors())
    trainer = quiet_trainer(GradientRecorder(store), val_check_interval=2)
    trainer.fit(Validated(mlp()), data, loader(vectors(), shuffle=False))
    assert sorted(torch.cat([step.sample_ids for step in store]).tolist()) == sorted(
        2 * [*range(13)]
    )
