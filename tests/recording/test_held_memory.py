"""Memory of a recorded step is free again as soon as the step is over."""

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from lightning_models import Plain, loader, mlp, quiet_trainer, vectors
from torch import Tensor, nn

from tda_lightning import GradientRecorder, HDF5Store
from tda_lightning.stores.hdf5.segment_sink import StepBuffer
from tda_lightning.stores.step import ParameterGroup, Step


class Garbage(pl.Callback):
    """Store the tensors that only the garbage collector frees, of some steps in the middle."""

    def __init__(self) -> None:
        self.tensors: list[Tensor] = []
        # Earlier tests may leave tensors that become free only now.
        self.earlier: dict[int, weakref.ref[Tensor]] = {}

    def on_train_batch_start(self, trainer: pl.Trainer, *arguments: Any) -> None:
        if trainer.global_step == 2:
            gc.collect()
            tensors = [each for each in gc.get_objects() if type(each) is Tensor]
            self.earlier = {id(each): weakref.ref(each) for each in tensors}
            gc.set_debug(gc.DEBUG_SAVEALL)

    def on_train_batch_end(self, trainer: pl.Trainer, *arguments: Any) -> None:
        if trainer.global_step == 6:
            gc.collect()
            gc.set_debug(0)
            # Other types, such as those of compilers, are not from recording.
            garbage = [thing for thing in gc.garbage if type(thing) is Tensor]
            self.tensors = [each for each in garbage if not self._is_earlier(each)]
            gc.garbage.clear()

    def _is_earlier(self, tensor: Tensor) -> bool:
        reference = self.earlier.get(id(tensor))
        return reference is not None and reference() is tensor


def slow(value: Any) -> Any:
    return pytest.param(value, marks=pytest.mark.slow)


def with_batch_norm() -> nn.Module:
    return nn.Sequential(nn.Linear(7, 11), nn.BatchNorm1d(11), nn.ReLU(), nn.Linear(11, 3))


@pytest.mark.parametrize("network", [mlp, slow(with_batch_norm)])
@pytest.mark.parametrize("optimizer", [slow(torch.optim.SGD), torch.optim.AdamW])
@pytest.mark.parametrize("curvature", [slow("none"), "fisher"])
def test_a_recorded_step_leaves_no_tensor_to_the_garbage_collector(
    tmp_path: Path, network: Any, optimizer: Any, curvature: Any
) -> None:
    garbage = Garbage()
    recorder = GradientRecorder(HDF5Store(tmp_path / "run.tda"), curvature=curvature)
    model = Plain(network(), optimizer=lambda p: optimizer(p, lr=0.1))
    trainer = quiet_trainer(recorder, garbage, max_epochs=4)
    trainer.fit(model, loader(vectors(15), batch_size=5))
    assert trainer.global_step == 12
    assert [tuple(each.shape) for each in garbage.tensors] == []


def test_steps_that_wait_to_be_written_hold_no_tensors_of_the_training() -> None:
    buffer = StepBuffer(size=2**16)
    steps = []
    for index in range(7):
        step = Step(
            index=index,
            epoch=0,
            optimizer="SGD",
            groups=(ParameterGroup(0.1),),
            sample_ids=torch.arange(5) + index,
            weights=torch.full((5,), 0.2),
            losses=torch.rand(5),
            sketch=torch.randn(5, 11),
        )
        steps.append(step)
        buffer.add(step)
    columns = ("sketch", "sample_ids", "weights", "losses")
    addresses = {
        getattr(step, name).untyped_storage().data_ptr()
        for step in buffer.steps
        for name in columns
    }
    assert len(addresses) == len(columns)
    for buffered, step in zip(buffer.steps, steps, strict=True):
        assert all(torch.equal(getattr(buffered, n), getattr(step, n)) for n in columns[1:])
        assert torch.equal(buffered.sketch, step.sketch.bfloat16())
