"""Clipping by value: rows are exact where nothing was clipped, else as near as a factor comes."""

import pytest
import torch
from lightning_models import AppliedDiary, Plain, loader, mlp, quiet_trainer, vectors
from loss_scale import Scripted, ScriptedScaler

from tda_lightning import GradientRecorder, Identity
from tda_lightning.stores import MemoryStore
from tda_lightning.stores.contract import same

BY_VALUE = {"gradient_clip_algorithm": "value"}
ignore_bends = pytest.mark.filterwarnings("ignore:tda_lightning. clipping by value has bent")


class Motionless(torch.optim.SGD):
    """Takes steps of no length, so that the steps of two trainings can be compared."""

    def __init__(self, parameters):
        super().__init__(parameters, lr=0.0)


class OwnClipping(Plain):
    """Clips as it likes, whatever the trainer was told."""

    def configure_gradient_clipping(self, optimizer, *_, **__):
        self.clip_gradients(optimizer, 0.1, "norm")
        self.clip_gradients(optimizer, 0.01, "value")


def record(optimizer=Motionless, model=Plain, preconditioner="none", **settings):
    store, diary = MemoryStore(), AppliedDiary()
    recorder = GradientRecorder(
        store, projector=Identity(), audit=1, preconditioner=preconditioner, curvature="fisher"
    )
    trained = model(mlp(), optimizer=optimizer)
    trainer = quiet_trainer(recorder, diary, **settings)
    trainer.fit(trained, loader(vectors(), shuffle=False))
    assert "clip_gradients" not in vars(trainer.precision_plugin)
    assert all(float(audit.explained().min()) > 0.9999 for audit in store.audits())
    return store, diary


def flat(gradients):
    return torch.cat([one.flatten() for one in gradients.values()]).double()


def projected(diary):
    """The multiple of each gradient that is nearest to what clipping left of it."""
    pairs = [(flat(g), flat(a)) for g, a in zip(diary.gradients, diary.applied, strict=True)]
    return [float(after @ before / before.square().sum()) for before, after in pairs]


@pytest.mark.parametrize("optimizer", [Motionless, torch.optim.SGD, torch.optim.AdamW])
def test_where_nothing_is_clipped_the_run_is_that_without_clipping(optimizer):
    plain, _ = record(optimizer, preconditioner="optimizer")
    store, diary = record(optimizer, preconditioner="optimizer", gradient_clip_val=10.0, **BY_VALUE)
    assert projected(diary) == pytest.approx([1.0] * 6, abs=1e-14)
    assert all(map(same, plain, store))


def test_where_nothing_is_clipped_rows_sum_to_the_gradient():
    store, diary = record(torch.optim.SGD, gradient_clip_val=10.0, **BY_VALUE)
    for step, gradients in zip(store, diary.applied, strict=True):
        total, expected = step.sketch.double().sum(dim=0).norm(), flat(gradients).norm()
        assert float(total) == pytest.approx(float(expected), rel=1e-6)


@ignore_bends
@pytest.mark.parametrize(
    "settings",
    [
        {"gradient_clip_val": 0.05, **BY_VALUE},
        {"gradient_clip_val": 0.002, **BY_VALUE},
        {"gradient_clip_val": 0.01, "accumulate_grad_batches": 2, **BY_VALUE},
        {"model": OwnClipping},
    ],
    ids=str,
)
def test_clipped_rows_are_the_nearest_multiple_of_those_before(settings):
    store, diary = record(**settings)
    kept = {key: value for key, value in settings.items() if key == "accumulate_grad_batches"}
    plain, _ = record(**kept)
    factors = projected(diary)
    assert all(factor < 0.99 for factor in factors)
    for step, before, factor in zip(store, plain, factors, strict=True):
        torch.testing.assert_close(step.sketch, factor * before.sketch, rtol=1e-5, atol=1e-9)
        torch.testing.assert_close(step.weights, factor * before.weights, rtol=1e-5, atol=1e-9)
        # Curvature goes with the loss, and its rows with the root of it.
        rows = factor**0.5 * before.curvature_rows
        torch.testing.assert_close(step.curvature_rows, rows, rtol=1e-5, atol=1e-9)


@ignore_bends
@pytest.mark.filterwarnings("ignore:GradientRecorder. not recorded")
def test_the_multiple_is_that_of_what_is_recorded():
    store, diary = MemoryStore(), AppliedDiary()
    recorder = GradientRecorder(store, projector=Identity(), layers=["net.3"])
    trainer = quiet_trainer(recorder, diary, gradient_clip_val=0.02, **BY_VALUE)
    trainer.fit(Plain(mlp()), loader(vectors()))
    for kept in (diary.gradients, diary.applied):
        for number, gradients in enumerate(kept):
            kept[number] = {k: one for k, one in gradients.items() if k.startswith("net.3.")}
    factors = [float(step.weights.sum()) for step in store]
    assert factors == pytest.approx(projected(diary), rel=1e-5)


def test_the_first_step_that_is_bent_is_named_once_in_each_training():
    class Loud(Plain):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) * (100 if batch_idx == 1 else 1e-3)

    trainer = quiet_trainer(GradientRecorder(MemoryStore()), gradient_clip_val=0.1, **BY_VALUE)
    for step in (1, 7):
        with pytest.warns(UserWarning, match="tda_lightning: clipping by") as told:
            trainer.fit(Loud(mlp()), loader(vectors()))
        said = [str(one.message) for one in told if "clipping by" in str(one.message)]
        assert len(said) == 1
        assert f"bent the gradient of the SGD in step {step} (cosine 0." in said[0]
        assert "set `gradient_clip_algorithm='norm'`" in said[0]
        trainer.fit_loop.max_epochs = 4


def test_a_step_whose_gradients_overflow_is_skipped_without_a_word():
    class Overflows(Plain):
        def training_step(self, batch, batch_idx):
            factor = float("inf") if batch_idx == 1 else 1.0
            return super().training_step(batch, batch_idx) * factor

    store = MemoryStore()
    plugins = [Scripted(ScriptedScaler([256.0] * 9, {1}))]
    trainer = quiet_trainer(
        GradientRecorder(store), plugins=plugins, max_epochs=1, gradient_clip_val=10.0, **BY_VALUE
    )
    trainer.fit(Overflows(mlp()), loader(vectors()))
    assert [step.index for step in store] == [0, 2]


def test_what_is_clipped_a_little_is_not_worth_a_word():
    _, diary = record(gradient_clip_val=0.65, **BY_VALUE)
    assert min(projected(diary)) < 1


@ignore_bends
def test_a_training_that_fails_is_left_with_its_own_clipping(tmp_path):
    class Fails(Plain):
        def training_step(self, batch, batch_idx):
            if batch_idx == 1:
                raise RuntimeError("on purpose")
            return super().training_step(batch, batch_idx)

    recorders = [GradientRecorder(tmp_path / name) for name in "ab"]
    trainer = quiet_trainer(*recorders, gradient_clip_val=0.01, **BY_VALUE)
    with pytest.raises(RuntimeError, match="on purpose"):
        trainer.fit(Fails(mlp()), loader(vectors()))
    assert "clip_gradients" not in vars(trainer.precision_plugin)
