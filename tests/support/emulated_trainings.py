"""Recorded trainings on the CPU and on the emulated device, and the comparison of their results."""

import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import emulated_device
import pytorch_lightning as pl
import torch
from lightning_models import Plain, loader, mlp, quiet_trainer
from pytorch_lightning.accelerators import Accelerator, CPUAccelerator
from pytorch_lightning.strategies import SingleDeviceStrategy
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import tda_lightning as tda
from tda_lightning.stores import MemoryStore


class Device(Accelerator):
    """The emulated device as a Lightning accelerator."""

    def setup_device(self, device: torch.device) -> None:
        pass

    def teardown(self) -> None:
        pass

    def get_device_stats(self, device: Any) -> dict[str, Any]:
        return {}

    @staticmethod
    def parse_devices(devices: Any) -> Any:
        return devices

    @staticmethod
    def get_parallel_devices(devices: Any) -> list[torch.device]:
        return [torch.device("elsewhere", 0)]

    @staticmethod
    def auto_device_count() -> int:
        return 1

    @staticmethod
    def is_available() -> bool:
        return True

    @staticmethod
    def name() -> str:
        return "elsewhere"


class Strategy(SingleDeviceStrategy):
    """Ties weights again after they were moved; for real devices, torch itself keeps the ties."""

    def model_to_device(self) -> None:
        model = self.model
        assert model is not None
        names: dict[Tensor, list[str]] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            names.setdefault(parameter, []).append(name)
        super().model_to_device()
        for first, *others in names.values():
            for name in others:
                owner, _, attribute = name.rpartition(".")
                setattr(model.get_submodule(owner), attribute, model.get_parameter(first))


@dataclass(frozen=True)
class Place:
    """Where a model is trained."""

    accelerator: Any
    name: str

    @property
    def device(self) -> torch.device:
        return torch.device(self.name)

    def trainer(self, *callbacks: pl.Callback, **settings: Any) -> Any:
        # Lightning would choose the CPU for an accelerator that it does not know.
        strategy = Strategy(self.device, accelerator=self.accelerator)
        return quiet_trainer(*callbacks, accelerator="auto", strategy=strategy, **settings)


# What the kinds of GPUs refuse.
KINDS = {"cuda": set(), "apple": emulated_device.APPLE}
HERE = Place(CPUAccelerator(), "cpu")
THERE = Place(Device(), "elsewhere:0")


class Setup:
    """A recorded training in one place, with data and queries."""

    def __init__(self, place: Place, folder: Path) -> None:
        self.place, self.folder, self.numbers = place, folder, count()
        generator = torch.Generator().manual_seed(3)
        labels = torch.randint(3, (23,), generator=generator)
        self.vectors = TensorDataset(torch.randn(23, 7, generator=generator), labels)
        self.tokens = TensorDataset(torch.randint(7, (23, 11), generator=generator), labels)
        self.model = Plain(mlp(), optimizer=lambda p: torch.optim.AdamW(p, lr=0.01))
        self.run, self.live = self.train(self.model, self.vectors, curvature="fisher", snapshots=3)
        self.model.to(place.device)
        self.queries = self.vectors[:5]

    def path(self, suffix: str) -> Path:
        """Return the path of a new file."""
        return self.folder / f"{self.place.device.type}-{next(self.numbers)}{suffix}"

    def train(self, model: Plain, data: TensorDataset, **settings: Any) -> tuple[Any, Any]:
        """Return the recorded run, and the contributions of a tracker."""
        path = self.path(".tda")
        recorder = tda.GradientRecorder(path, audit=2, **settings)
        tracker = tda.ContributionTracker(data[:3], self.path(".npz"))
        randomize(model)
        self.place.trainer(recorder, tracker).fit(model, loader(data))
        return tda.HDF5Store.open(path), tracker.contributions

    def rows(self, model: pl.LightningModule, data: Any, **settings: Any) -> Tensor:
        """Train a model with settings of the trainer; return its rows and their losses."""
        store = MemoryStore()
        randomize(model)
        self.place.trainer(tda.GradientRecorder(store, audit=2), **settings).fit(model, data)
        losses = [step.losses for step in store if step.losses is not None]
        return torch.cat([*(step.sketch.flatten() for step in store), *losses])

    def batches(self) -> Any:
        return loader(self.vectors, shuffle=False)


def randomize(model: nn.Module) -> None:
    torch.manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)


# Every value is a chain of sums. The longest has (columns of a row) x (visits of a run) terms.
MAX_TERMS = 2048 * 46
# An upper bound of the number of sums: gradient, row, curvature, direction, score.
MAX_SUMS = 8


def same_values(value: Tensor, expected: Tensor) -> bool:
    """Return whether two results agree to rounding; shape, dtype and device must be the same.

    The order of the terms of a sum depends on the processor and on the alignment of memory.
    Rounding errors of a sum of n terms grow like the square root of n. See Higham & Mary (2019),
    "A New Approach to Probabilistic Rounding Error Analysis".
    """
    assert value.shape == expected.shape
    assert value.dtype == expected.dtype
    assert value.device == expected.device
    bound = MAX_SUMS * MAX_TERMS**0.5 * torch.finfo(expected.dtype).eps
    return bool((value - expected).abs().max() <= bound * expected.abs().max())


def compare(cases: Mapping[str, Callable[[Setup], Tensor]], folder: Path) -> None:
    """Print for each case whether both places give the same."""
    here, there = Setup(HERE, folder), Setup(THERE, folder)
    for name, case in cases.items():
        equal = lambda case=case: same_values(case(there), case(here))  # noqa: E731
        print(name, outcome(equal), sep=": ", flush=True)


def outcome(call: Callable[[], Any]) -> str:
    try:
        return "equal" if call() else "different"
    except Exception as error:
        traceback.print_exc()
        return f"{type(error).__name__} {error}".replace("\n", " ")[:200]
