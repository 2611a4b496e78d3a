"""A good guest: weights bit-identical with and without the callback, and nothing left behind."""

import contextlib

import lightning.pytorch
import pytest
import pytorch_lightning as pl
import torch
from lightning_models import Plain, loader, mlp, quiet_trainer, vectors

from tda_lightning import GradientRecorder, MemoryStore

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


def assert_bit_identical(one, other):
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_weights_are_bit_identical_with_the_callback(optimizer, workers):
    plain = train(optimizer, workers=workers)
    recorded = train(optimizer, GradientRecorder(MemoryStore()), workers=workers)
    assert_bit_identical(plain, recorded)


@pytest.mark.parametrize(
    "settings",
    [
        {"accumulate_grad_batches": 2},
        {"gradient_clip_val": 0.05},
        {"limit_train_batches": 2},
        {"precision": "bf16-mixed"},
        {"max_steps": 3},
        {"reload_dataloaders_every_n_epochs": 1},
    ],
    ids=str,
)
def test_weights_are_bit_identical_under(settings):
    plain = train(OPTIMIZERS["AdamW"], **settings)
    recorded = train(OPTIMIZERS["AdamW"], GradientRecorder(MemoryStore()), **settings)
    assert_bit_identical(plain, recorded)


@pytest.mark.parametrize(
    ("trainer_type", "module_type"),
    [
        (pl.Trainer, pl.LightningModule),
        (lightning.pytorch.Trainer, lightning.pytorch.LightningModule),
    ],
    ids=["pytorch_lightning", "lightning.pytorch"],
)
def test_both_trainers_record(trainer_type, module_type):
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


def test_validation_and_sanity_check_leave_no_trace():
    class Validated(Plain):
        def validation_step(self, batch, batch_idx):
            return self.loss(self.net(batch[0]), batch[1])

    store, data = MemoryStore(), loader(vectors())
    trainer = quiet_trainer(GradientRecorder(store), val_check_interval=2)
    trainer.fit(Validated(mlp()), data, loader(vectors(), shuffle=False))
    assert sorted(torch.cat([step.sample_ids for step in store]).tolist()) == sorted(
        2 * [*range(13)]
    )
