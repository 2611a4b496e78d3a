"""The same trainings and questions on the CPU and elsewhere; run as a script, which says if equal.

In a process of its own: an error in a backward pass elsewhere ends it, since torch does not get an
exception past a device that is written in Python.
"""

import tempfile
import traceback
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import emulated_device
import torch
from lightning_models import Plain, loader, mlp, quiet_trainer
from pytorch_lightning.accelerators import Accelerator
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import tda_lightning as tda
from tda_lightning.attribution import Linear, LossWeighted, Mixed
from tda_lightning.features import LocalJacobianExpansion, query_features, representers


class Branches(nn.Module):
    """Layers of many kinds, on 11 tokens or pixels in a row."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 6)
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True, dropout=0.1)
        self.recurrent = nn.GRU(6, 5, batch_first=True)
        self.convolution = nn.Conv1d(5, 4, 3, padding=1, groups=1)
        self.norms = nn.Sequential(nn.GroupNorm(2, 4), nn.PReLU(4), nn.BatchNorm1d(4))
        self.head = nn.Sequential(nn.Dropout(0.2), nn.LayerNorm(4), nn.Linear(4, 3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.embedding(x)
        x = x + self.attention(x, x, x, need_weights=False)[0]
        x, _ = self.recurrent(x)
        return self.head(self.norms(self.convolution(x.mT)).mean(dim=2))


class Pictures(nn.Module):
    """Convolutions of vectors of 7 numbers, laid out in a plane."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 2, 2)
        self.second = nn.ConvTranspose2d(2, 4, 2, groups=2)
        self.norm = nn.BatchNorm2d(4)
        self.bag = nn.EmbeddingBag(5, 3)
        self.head = nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        plane = x[:, None, :, None] * x[:, None, None, :]
        found = self.norm(self.second(self.first(plane).relu())).mean(dim=(2, 3))
        words = (x[:, :4] > 0).long()
        return self.head(torch.cat([found, self.bag(words)], dim=1))


class Device(Accelerator):
    """The device, as Lightning wants to know it."""

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


class Where:
    """A training on a device, for questions there."""

    def __init__(self, accelerator: Any, device: torch.device) -> None:
        self.accelerator, self.device = accelerator, device
        generator = torch.Generator().manual_seed(3)
        labels = torch.randint(3, (23,), generator=generator)
        self.vectors = TensorDataset(torch.randn(23, 7, generator=generator), labels)
        self.tokens = TensorDataset(torch.randint(7, (23, 11), generator=generator), labels)
        self.model = Plain(mlp(), optimizer=lambda p: torch.optim.AdamW(p, lr=0.01))
        self.run, self.live = self.train(self.model, self.vectors, curvature="fisher", snapshots=3)
        self.model.to(device)
        self.queries = self.vectors[:5]

    def train(self, model: Plain, data: TensorDataset, **settings: Any) -> tuple[Any, Any]:
        """Return what was recorded, and what a tracker followed."""
        torch.manual_seed(0)
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.3)
        folder = Path(tempfile.mkdtemp(dir=WORKSPACE))
        recorder = tda.GradientRecorder(folder / "run.tda", audit=2, **settings)
        tracker = tda.ContributionTracker(data[:3], folder / "probe.npz")
        callbacks = [recorder, tracker]
        quiet_trainer(*callbacks, accelerator=self.accelerator, devices=1).fit(model, loader(data))
        return tda.HDF5Store.open(folder / "run.tda"), tracker.contributions

    def batches(self) -> Any:
        return loader(self.vectors, shuffle=False)


def rows(net: Callable[[], nn.Module], tokens: bool, **settings: Any) -> Callable[[Where], Tensor]:
    """Return what records a training and gives all its rows."""

    def recorded(w: Where) -> Tensor:
        model = Plain(net())
        run, _ = w.train(model, w.tokens if tokens else w.vectors, **settings)
        return torch.cat([step.sketch for step in run])

    return recorded


def outputs(module: Any, batch: Any) -> Tensor:
    return module.net(batch[0])


def asked(**settings: Any) -> Callable[[Where], Tensor]:
    return lambda w: tda.attribute(w.run, w.model, w.queries, progress=False, **settings).values


def in_full(**settings: Any) -> Callable[[Where], Tensor]:
    return lambda w: (
        tda.attribute_by_gradients(
            w.model, w.batches(), w.queries, progress=False, **settings
        ).values
    )


def along(w: Where) -> Tensor:
    return in_full(run=w.run, at="snapshots")(w)


def by_features(method: Any) -> Callable[[Where], Tensor]:
    return lambda w: (
        tda.attribute_by_features(
            w.model, w.batches(), w.queries, method=method, progress=False
        ).values
    )


def anew(w: Where, labels: Any) -> Any:
    return tda.record(w.model, w.batches(), like=w.run, labels=labels, progress=False)


def embedded(w: Where, method: Any) -> Tensor:
    gradients = tda.record_queries(w.model, w.queries, like=w.run, progress=False)
    found = tda.embed(w.run, method=method, device=w.device, progress=False)
    return found.attribute(gradients).values


def representer_values(w: Where) -> Tensor:
    found = representers(w.model, w.batches(), progress=False)
    return found.attribute(query_features(w.model, w.queries, reads="head")).values


CASES: dict[str, Callable[[Where], Tensor]] = {
    "rows": lambda w: torch.cat([step.sketch for step in w.run]),
    "rows of sampled labels": lambda w: torch.cat([step.curvature_rows for step in w.run]),
    "audits": lambda w: torch.cat([audit.explained() for audit in w.run.audits()]),
    "followed live": lambda w: w.live.values,
    "rows of many layers": rows(Branches, True),
    "rows of convolutions": rows(Pictures, False),
    "rows of convolutions, whole": rows(Pictures, False, projector=tda.Identity()),
    "rows, whole": rows(mlp, False, projector=tda.Identity()),
    "rows, layer by layer": rows(mlp, False, projector=tda.Kronecker(3)),
    "rows, dense projection": rows(mlp, False, projector=tda.DenseProjection(17)),
    "rows, count sketch": rows(mlp, False, projector=tda.CountSketch(17)),
    "TracIn": asked(method=tda.TracIn()),
    "TracIn at snapshots": asked(method=tda.TracIn(), at="snapshots"),
    "Unrolled": asked(),
    "Unrolled at snapshots": asked(at="snapshots"),
    "Unrolled in training mode": asked(mode="train"),
    "Unrolled, loss-weighted": asked(method=tda.Unrolled(curvature=LossWeighted())),
    "Unrolled, mixed": asked(method=tda.Unrolled(Mixed(), Linear())),
    "InfluenceFunction": asked(method=tda.InfluenceFunction()),
    "TRAK": asked(method=tda.TRAK()),
    "Source": asked(method=tda.Source()),
    "GradientSimilarity": asked(method=tda.GradientSimilarity()),
    "a logit": asked(target=tda.Logit(1, outputs=outputs)),
    "a margin": asked(target=tda.Margin(outputs=outputs)),
    "a log-probability": asked(target=tda.LogProbability(outputs=outputs)),
    "an ensemble": lambda w: (
        (
            tda.attribute([w.run] * 2, [w.model] * 2, w.queries, method=tda.TRAK(), progress=False)
        ).values
    ),
    "curvature anew": lambda w: asked(
        method=tda.InfluenceFunction(curvature_from=anew(w, "sampled"))
    )(w),
    "rows anew": lambda w: asked(method=tda.InfluenceFunction(rows_from=anew(w, "given")))(w),
    "self-influence": lambda w: tda.self_influence(w.run, progress=False).values,
    "the best only": lambda w: (
        tda.top_attributions(w.run, w.model, w.queries, 3, progress=False).proponents.values
    ),
    "a trajectory": lambda w: (
        tda.trajectory(w.run, w.model, w.queries, [1, 2], progress=False).values
    ),
    "an embedding": lambda w: embedded(w, tda.Unrolled()),
    "an embedding of influence": lambda w: embedded(w, tda.InfluenceFunction()),
    "FeatureSimilarity": by_features(tda.FeatureSimilarity()),
    "RepresenterPoint": representer_values,
    "LocalJacobianExpansion": by_features(LocalJacobianExpansion()),
    "whole gradients": in_full(method=tda.FullInfluenceFunction(damping=0.1)),
    "whole gradients along the run": along,
}


# What must be refused, or all that is equal would say nothing.
MEETINGS: dict[str, Callable[[Tensor], Any]] = {
    "a product": lambda there: there @ torch.ones(3, 5),
    "a sum": lambda there: there + torch.ones(2, 3),
    "a concatenation": lambda there: torch.cat([there, torch.ones(1, 3)]),
    "sums here of what is there": lambda there: torch.zeros(4, 3).index_add_(
        0, torch.tensor([0, 1]), there
    ),
    "an index that must be there": lambda there: there.index_select(0, torch.tensor([0])),
    "an index there of what is here": lambda there: torch.ones(5)[there.long()],
    "a value for what is there": lambda there: there.index_put_(
        (torch.tensor([0]),), torch.ones(1, 3)
    ),
    "an array": lambda there: there.numpy(),
}


def answer(call: Callable[[], Any]) -> str:
    try:
        return "equal" if call() else "unlike"
    except Exception as error:
        traceback.print_exc()
        return f"{type(error).__name__} {error}".replace("\n", " ")


def main() -> None:
    lonely = torch.ones(2, 3, device="elsewhere")
    for name, meeting in MEETINGS.items():
        print(name, answer(partial(meeting, lonely)), sep=": ", flush=True)
    here = Where("cpu", torch.device("cpu"))
    there = Where(Device(), torch.device("elsewhere", 0))
    for name, case in CASES.items():
        equal = lambda case=case: torch.equal(case(there), case(here))  # noqa: E731
        print(name, answer(equal), sep=": ", flush=True)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    libraries = emulated_device.install()
    with tempfile.TemporaryDirectory() as WORKSPACE:
        main()
