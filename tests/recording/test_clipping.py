"""Clipping by value: rows are exact where nothing is clipped, else scaled by the nearest factor."""

import pytest
import torch
from lightning_models import AppliedGradientsLog, Plain, loader, mlp, quiet_trainer, vectors
from loss_scale import Scripted, ScriptedScaler

from tda_lightning import GradientRecorder, Identity
from tda_lightning.stores import MemoryStore
from tda_lightning.stores.contract import same

BY_VALUE = {"gradient_clip_algorithm": "value"}
ignore_clipping_warnings = pytest.mark.filterwarnings(
    "ignore:tda_lightning. clipping by value has changed"
)


class Motionless(torch.optim.SGD):
    """Takes steps of length zero, so that the steps of two trainings can be compared."""

    def __init__(self, parameters):
        super().__init__(parameters, lr=0.0)


class CustomClipping(Plain):
    """Clips by norm and by value, regardless of the trainer's settings."""

    def configure_gradient_clipping(self, optimizer, *_, **__):
        self.clip_gradients(optimizer, 0.1, "norm")
        self.clip_gradients(optimizer, 0.01, "value")


def record(optimizer=Motionless, model=Plain, preconditioner="none", **settings):
    store, log = MemoryStore(), AppliedGradientsLog()
    recorder = GradientRecorder(
        store, projector=Identity(), audit=1, preconditioner=preconditioner, curvature="fisher"
    )
    trained = model(mlp(), optimizer=optimizer)
    trainer = quiet_trainer(recorder, log, **settings)
    trainer.fit(trained, loader(vectors(), shuffle=False))
    assert "clip_gradients" not in vars(trainer.precision_plugin)
    assert all(float(audit.explained().min()) > 0.9999 for audit in store.audits())
    return store, log


def flat(gradients):
    return torch.cat([gradient.flatten() for gradient in gradients.values()]).double()


def nearest_factors(log):
    """Return the factor of the multiple of each gradient that is nearest to the clipped one."""
    pairs = [(flat(g), flat(a)) for g, a in zip(log.gradients, log.applied, strict=True)]
    return [float(after @ before / before.square().sum()) for before, after in pairs]


@pytest.mark.parametrize("optimizer", [Motionless, torch.optim.SGD, torch.optim.AdamW])
def test_where_nothing_is_clipped_the_run_equals_one_without_clipping(optimizer):
    plain, _ = record(optimizer, preconditioner="optimizer")
    store, log = record(optimizer, preconditioner="optimizer", gradient_clip_val=10.0, **BY_VALUE)
    assert nearest_factors(log) == pytest.approx([1.0] * 6, abs=1e-14)
    assert all(map(same, plain, store))


def test_where_nothing_is_clipped_rows_sum_to_the_gradient():
    store, log = record(torch.optim.SGD, gradient_clip_val=10.0, **BY_VALUE)
    for step, gradients in zip(store, log.applied, strict=True):
        total, expected = step.sketch.double().sum(dim=0).norm(), flat(gradients).norm()
        assert float(total) == pytest.approx(float(expected), rel=1e-6)


@ignore_clipping_warnings
@pytest.mark.parametrize(
    "settings",
    [
        {"gradient_clip_val": 0.05, **BY_VALUE},
        {"gradient_clip_val": 0.002, **BY_VALUE},
        {"gradient_clip_val": 0.01, "accumulate_grad_batches": 2, **BY_VALUE},
        {"model": CustomClipping},
    ],
    ids=str,
)
def test_clipped_rows_are_the_nearest_multiple_of_the_unclipped_rows(settings):
    store, log = record(**settings)
    accumulation = {
        key: value for key, value in settings.items() if key == "accumulate_grad_batches"
    }
    plain, _ = record(**accumulation)
    factors = nearest_factors(log)
    assert all(factor < 0.99 for factor in factors)
    for step, before, factor in zip(store, plain, factors, strict=True):
        torch.testing.assert_close(step.sketch, factor * before.sketch, rtol=1e-5, atol=1e-9)
        torch.testing.assert_close(step.weights, factor * before.weights, rtol=1e-5, atol=1e-9)
        # Curvature scales with the loss, and its rows with the square root.
        rows = factor**0.5 * before.curvature_rows
        torch.testing.assert_close(step.curvature_rows, rows, rtol=1e-5, atol=1e-9)


@ignore_clipping_warnings
@pytest.mark.filterwarnings("ignore:GradientRecorder. not recorded")
def test_the_factor_is_computed_from_the_recorded_layers():
    store, log = MemoryStore(), AppliedGradientsLog()
    recorder = GradientRecorder(store, projector=Identity(), layers=["net.3"])
    trainer = quiet_trainer(recorder, log, gradient_clip_val=0.02, **BY_VALUE)
    trainer.fit(Plain(mlp()), loader(vectors()))
    for steps in (log.gradients, log.applied):
        for number, gradients in enumerate(steps):
            steps[number] = {k: v for k, v in gradients.items() if k.startswith("net.3.")}
    factors = [float(step.weights.sum()) for step in store]
    assert factors == pytest.approx(nearest_factors(log), rel=1e-5)


def test_each_training_warns_once_of_a_changed_direction():
    class Loud(Plain):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) * (100 if batch_idx == 1 else 1e-3)

    trainer = quiet_trainer(GradientRecorder(MemoryStore()), gradient_clip_val=0.1, **BY_VALUE)
    for step in (1, 7):
        with pytest.warns(UserWarning, match="tda_lightning: clipping by") as caught:
            trainer.fit(Loud(mlp()), loader(vectors()))
        messages = [str(w.message) for w in caught if "clipping by" in str(w.message)]
        assert len(messages) == 1
        assert f"direction of the gradient of the SGD in step {step} (cosine 0." in messages[0]
        assert "set `gradient_clip_algorithm='norm'`" in messages[0]
        trainer.fit_loop.max_epochs = 4


def test_a_step_with_overflowing_gradients_is_skipped_without_a_warning():
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


def test_slight_clipping_does_not_warn():
    _, log = record(gradient_clip_val=0.65, **BY_VALUE)
    assert min(nearest_factors(log)) < 1


@ignore_clipping_warnings
def test_a_training_that_fails_restores_the_original_clipping(tmp_path):
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
