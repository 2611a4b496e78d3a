"""Compare trainings and queries on the CPU and on the emulated device; run as a script.

Its argument is `cuda` or `apple`.

It runs in a separate process, since an error in a backward pass on the device ends the process.
torch cannot pass an exception through a device that is written in Python.
"""

import sys
import tempfile
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import emulated_device
import lean_lightning  # noqa: F401, before Lightning
import pytorch_lightning as pl
import torch
from emulated_trainings import KINDS, THERE, Setup, compare, outcome
from lightning_models import Plain, loader, mlp, vectors
from torch import Tensor, nn

import tda_lightning as tda
from tda_lightning.attribution import Linear, LossWeighted, Mixed
from tda_lightning.features import LocalJacobianExpansion, query_features, representers
from tda_lightning.recording import taken_step
from tda_lightning.stores import MemoryStore


class Branches(nn.Module):
    """Layers of many kinds for sequences of 11 tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.positions = nn.Embedding(7, 6), nn.Parameter(torch.zeros(11, 6))
        self.narrowing = nn.Sequential(nn.Linear(6, 5), nn.Tanh())
        self.norms = nn.Sequential(nn.LayerNorm(5), nn.PReLU(), nn.Linear(5, 4, bias=False))
        self.head = nn.Sequential(nn.Dropout(0.2), nn.LayerNorm(4), nn.Linear(4, 3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.narrowing(self.embedding(x) + self.positions)
        return self.head(self.norms(x).mean(dim=1))


def rows(net: Callable[[], nn.Module], tokens: bool, **settings: Any) -> Callable[[Setup], Tensor]:
    """Return a function that records a training and returns all its rows."""

    def recorded_rows(s: Setup) -> Tensor:
        model = Plain(net())
        run, _ = s.train(model, s.tokens if tokens else s.vectors, **settings)
        return torch.cat([step.sketch for step in run])

    return recorded_rows


def outputs(module: Any, batch: Any) -> Tensor:
    return module.net(batch[0])


def attributed(**settings: Any) -> Callable[[Setup], Tensor]:
    return lambda s: tda.attribute(s.run, s.model, s.queries, progress=False, **settings).values


def by_gradients(**settings: Any) -> Callable[[Setup], Tensor]:
    return lambda s: (
        tda.attribute_by_gradients(
            s.model, s.batches(), s.queries, progress=False, **settings
        ).values
    )


def by_gradients_at_snapshots(s: Setup) -> Tensor:
    return by_gradients(run=s.run, at="snapshots")(s)


def by_features(method: Any) -> Callable[[Setup], Tensor]:
    return lambda s: (
        tda.attribute_by_features(
            s.model, s.batches(), s.queries, method=method, progress=False
        ).values
    )


def recorded_again(s: Setup, labels: Any) -> Any:
    return tda.record(s.model, s.batches(), like=s.run, labels=labels, progress=False)


def embedding_scores(s: Setup, method: Any) -> Tensor:
    gradients = tda.record_queries(s.model, s.queries, like=s.run, progress=False)
    embedding = tda.embed(s.run, method=method, device=s.place.device, progress=False)
    return embedding.attribute(gradients).values


def representer_scores(s: Setup) -> Tensor:
    points = representers(s.model, s.batches(), progress=False)
    return points.attribute(query_features(s.model, s.queries, reads="head")).values


CASES: dict[str, Callable[[Setup], Tensor]] = {
    "rows": lambda s: torch.cat([step.sketch for step in s.run]),
    "rows of sampled labels": lambda s: torch.cat([step.curvature_rows for step in s.run]),
    "audits": lambda s: torch.cat([audit.explained() for audit in s.run.audits()]),
    "contributions": lambda s: s.live.values,
    "rows of many layers": rows(Branches, True),
    "rows, no projection": rows(mlp, False, projector=tda.Identity()),
    "rows, layer by layer": rows(mlp, False, projector=tda.Kronecker(3)),
    "rows, dense projection": rows(mlp, False, projector=tda.DenseProjection(17)),
    "rows, count sketch": rows(mlp, False, projector=tda.CountSketch(17)),
    "TracIn": attributed(method=tda.TracIn()),
    "TracIn at snapshots": attributed(method=tda.TracIn(), at="snapshots"),
    "Averaged, the default": attributed(),
    "Unrolled": attributed(method=tda.Unrolled()),
    "Unrolled at snapshots": attributed(at="snapshots"),
    "Unrolled in training mode": attributed(mode="train"),
    "Unrolled, loss-weighted": attributed(method=tda.Unrolled(curvature=LossWeighted())),
    "Unrolled, mixed": attributed(method=tda.Unrolled(Mixed(), Linear())),
    "InfluenceFunction": attributed(method=tda.InfluenceFunction()),
    "TRAK": attributed(method=tda.TRAK()),
    "Source": attributed(method=tda.Source()),
    "GradientSimilarity": attributed(method=tda.GradientSimilarity()),
    "a logit": attributed(target=tda.Logit(1, outputs=outputs)),
    "a margin": attributed(target=tda.Margin(outputs=outputs)),
    "a log-probability": attributed(target=tda.LogProbability(outputs=outputs)),
    "an ensemble": lambda s: (
        (
            tda.attribute([s.run] * 2, [s.model] * 2, s.queries, method=tda.TRAK(), progress=False)
        ).values
    ),
    "curvature recorded again": lambda s: attributed(
        method=tda.InfluenceFunction(curvature_from=recorded_again(s, "sampled"))
    )(s),
    "rows recorded again": lambda s: attributed(
        method=tda.InfluenceFunction(rows_from=recorded_again(s, "given"))
    )(s),
    "self-influence": lambda s: tda.self_influence(s.run, progress=False).values,
    "top attributions": lambda s: (
        tda.top_attributions(s.run, s.model, s.queries, 3, progress=False).proponents.values
    ),
    "a trajectory": lambda s: (
        tda.trajectory(s.run, s.model, s.queries, [1, 2], progress=False).values
    ),
    "an embedding": lambda s: embedding_scores(s, tda.Unrolled()),
    "an embedding of influence": lambda s: embedding_scores(s, tda.InfluenceFunction()),
    "FeatureSimilarity": by_features(tda.FeatureSimilarity()),
    "RepresenterPoint": representer_scores,
    "LocalJacobianExpansion": by_features(LocalJacobianExpansion()),
    "full gradients": by_gradients(method=tda.FullInfluenceFunction(damping=0.1)),
    "full gradients at snapshots": by_gradients_at_snapshots,
}


class Silent(Plain):
    """Logs nothing, so that training alone makes no transfer."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.loss(self.net(batch[0]), batch[1])


class StepTransfers(pl.Callback):
    """Collects the transfers of some training steps."""

    def __init__(self, steps: range) -> None:
        self.steps, self.transfers = steps, []

    def on_train_batch_start(self, trainer: Any, *arguments: Any) -> None:
        if trainer.global_step in self.steps:
            emulated_device.transfers = []

    def on_train_batch_end(self, trainer: Any, *arguments: Any) -> None:
        self.transfers += emulated_device.transfers or []
        emulated_device.transfers = None


def transfers_of_steps(optimizer: Callable[[Any], Any], *callbacks: pl.Callback) -> list[str]:
    """Return the transfers of eight steps without audit, with unchanged coordinates."""
    taken_step._SECONDS_TOGETHER = float("inf")  # However slow the machine is.
    log = StepTransfers(range(22, 30))  # Later than the first twenty.
    trainer = THERE.trainer(log, *callbacks, max_epochs=10)
    trainer.fit(Silent(mlp(), optimizer=optimizer), loader(vectors()))
    return log.transfers


OPTIMIZERS: dict[str, Callable[[Any], Any]] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.01),
}


# Operations that mix devices. They must be refused, or equal results would prove nothing.
MIXED_DEVICES: dict[str, Callable[[Tensor], Any]] = {
    "a product": lambda there: there @ torch.ones(3, 5),
    "a sum": lambda there: there + torch.ones(2, 3),
    "a concatenation": lambda there: torch.cat([there, torch.ones(1, 3)]),
    "index_add_ of a device tensor to a CPU tensor": lambda there: torch.zeros(4, 3).index_add_(
        0, torch.tensor([0, 1]), there
    ),
    "index_select with a CPU index": lambda there: there.index_select(0, torch.tensor([0])),
    "a CPU tensor indexed by a device tensor": lambda there: torch.ones(5)[there.long()],
    "index_put_ of a CPU value": lambda there: there.index_put_(
        (torch.tensor([0]),), torch.ones(1, 3)
    ),
    "a NumPy array": lambda there: there.numpy(),
}


def main(folder: Path) -> None:
    on_device = torch.ones(2, 3, device="elsewhere")
    for name, operation in MIXED_DEVICES.items():
        print(name, outcome(partial(operation, on_device)), sep=": ", flush=True)
    for name, optimizer in OPTIMIZERS.items():
        plain = transfers_of_steps(optimizer)
        recorder = tda.GradientRecorder(MemoryStore(), snapshots=0)
        recorded = transfers_of_steps(optimizer, recorder)
        print(f"transfers with {name}: {plain} {recorded} {len(recorder.store)}", flush=True)
    compare(CASES, folder)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    libraries = emulated_device.install(KINDS[sys.argv[1]])
    with tempfile.TemporaryDirectory() as workspace:
        main(Path(workspace))
