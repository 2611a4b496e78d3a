"""TrackedTraining: the state of a contribution tracker in one training, and its cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Int
from pytorch_lightning.utilities import rank_zero_warn

from tda_lightning.callbacks.lightning_trainer import LightningModule, Trainer, distributed_context
from tda_lightning.callbacks.tracking.probe import Probe
from tda_lightning.gradients.capture.delivery import NO_EFFECT
from tda_lightning.gradients.parameter_selection import ParameterSelection, row_dtype
from tda_lightning.gradients.row_recorder import RowRecorder
from tda_lightning.gradients.sketching.projectors import Identity, KroneckerCountSketch, Projector
from tda_lightning.passes.model_state import Mode
from tda_lightning.recording.contribution_recorder import (
    ContributionRecorder,
    ContributionTable,
    Period,
)
from tda_lightning.recording.preconditioning import has_preconditioner
from tda_lightning.recording.settings import RecordingSettings
from tda_lightning.recording.trained_layers import select_trained_layers
from tda_lightning.results.contributions import Contributions
from tda_lightning.stores.recipe import LeftOut, SampleAxis

# Gradients are compared in full if those of a step's samples, and of all probes, fit in this.
_MAX_NUMBERS = 10_000_000


@dataclass(frozen=True)
class TrackerSettings:
    """The arguments of a :class:`~tda_lightning.ContributionTracker`; see there."""

    every_n_steps: int
    period: Period
    projector: Projector | None
    layers: Sequence[str] | None
    preconditioner: Literal["optimizer", "none"]
    mode: Mode
    reduction: Literal["mean", "sum"]
    batch_dims: Mapping[str, SampleAxis]


@dataclass(frozen=True)
class TrackedTraining:
    """One tracked training.

    Attributes:
        recorder: Adds up the contributions of its steps.
        probe: The probe set.
        warnings: Warnings to show before training.
        facts: The provenance of the contributions.
        every_n_steps: Number of steps that a tracked one stands for.
    """

    recorder: ContributionRecorder
    probe: Probe
    warnings: tuple[str, ...]
    facts: Mapping[str, str]
    every_n_steps: int

    def contributions(self) -> Contributions:
        """Return the contributions so far."""
        table = self.recorder.table
        stride = "" if self.every_n_steps == 1 else f", one in {self.every_n_steps}"
        return Contributions(
            values=table.values(),
            times=table.times,
            query_ids=torch.arange(len(self.probe)),
            train_ids=table.train_ids,
            method="ContributionTracker()",
            provenance={**self.facts, "steps": f"{table.steps}{stride}"},
        )

    def state(self) -> dict[str, Any]:
        """Return the state for a checkpoint."""
        return {**self.recorder.tracker_state(), "facts": self._expected()}

    def resume(self, state: Mapping[str, Any]) -> None:
        """Continue from the result of :meth:`state`.

        Raises:
            ValueError: If the checkpoint was saved with other settings.
        """
        for name, now in self._expected().items():
            before = state["facts"][name]
            if before != now:
                raise ValueError(
                    f"The tracker's `{name}` was {before!r} when the checkpoint was saved and is "
                    f"now {now!r}; expected the same, since new contributions are added to the "
                    "earlier ones. Restore it, or track into a new file from the beginning."
                )
        self.recorder.resume_tracker(state)

    def _expected(self) -> dict[str, str]:
        return {**self.facts, "every_n_steps": str(self.every_n_steps)}

    def describe_cost(self) -> str:
        """Return one line on the cost of tracking."""
        n_probe, n_train = len(self.probe), len(self.recorder.table.train_ids)
        stride = "" if self.every_n_steps == 1 else f" of every {self.every_n_steps} steps"
        passes = self.probe.n_batches
        size = f"{n_probe} x {n_train:,} numbers, {8 * n_probe * n_train / 2**20:,.1f} MiB,"
        table = size if n_train else f"{n_probe} numbers for each sample"
        return (
            f"tracking {n_probe} probes with {passes} more forward and backward "
            f"pass{'es' * (passes > 1)} per tracked step{stride}, compared by "
            f"{self.facts['projector']}; a table of {table} per {self.facts['period']}."
        )


def require_trackable(trainer: Trainer, module: LightningModule) -> None:
    """Check that this training has a single moment per step at which a probe can pass."""
    if not module.automatic_optimization:
        raise ValueError(
            "`ContributionTracker` cannot track manual optimization, where a probe that passes "
            "through `training_step` would be trained on; expected automatic optimization. Record "
            "with `GradientRecorder` instead, and query the run afterwards."
        )
    if trainer.world_size > 1:
        raise ValueError(
            f"`ContributionTracker` cannot track {trainer.world_size} processes; expected one. Set "
            "`Trainer(devices=1)`, or record with `GradientRecorder` and query the run afterwards."
        )


def track(
    settings: TrackerSettings,
    trainer: Trainer,
    model: LightningModule,
    probe: Probe,
    train_ids: Int[np.ndarray, " n_train"] | None,
) -> TrackedTraining:
    """Prepare to track a training that is about to start."""
    (optimizer,) = trainer.optimizers
    selection = select_trained_layers(model, settings.layers, [optimizer])
    projector, projector_warnings = _projector(settings, trainer, selection, len(probe))
    preconditioner = settings.preconditioner if has_preconditioner(optimizer) else "none"
    dtype = row_dtype(model)

    def rows(part: ParameterSelection) -> RowRecorder:
        return RowRecorder(model, part, settings.batch_dims, projector, dtype)

    recording_settings = RecordingSettings(
        optimization="automatic",
        rows=rows,
        reduction=settings.reduction,
        preconditioner=preconditioner,
        audit=0,
        distributed=distributed_context(trainer),
        warn=rank_zero_warn,
        leave_out=_warn_of_lost,
    )
    ids = torch.empty(0, dtype=torch.int64) if train_ids is None else torch.as_tensor(train_ids)
    table = ContributionTable(len(probe), ids, settings.period)
    recorder = ContributionRecorder(
        optimizer, selection, projector, recording_settings, table, settings.every_n_steps
    )
    period = settings.period
    facts = {
        "model": type(model).__name__,
        "optimizer": type(optimizer).__name__,
        "projector": ", ".join(f"{key}={value}" for key, value in projector.to_dict().items()),
        "rows": f"{recorder.rows.dimension} x {dtype}, coordinates of {preconditioner}",
        "weights": "those of each tracked step",
        "mode": settings.mode,
        "period": f"{period} steps" if isinstance(period, int) else period,
    }
    warnings = (*projector_warnings, *(entry.describe() for entry in selection.left_out))
    return TrackedTraining(recorder, probe, warnings, facts, settings.every_n_steps)


def _warn_of_lost(entries: Sequence[LeftOut]) -> None:
    for entry in entries:
        if NO_EFFECT not in entry.reason:
            rank_zero_warn(f"ContributionTracker: {entry.describe()}")


def _projector(
    settings: TrackerSettings, trainer: Trainer, selection: ParameterSelection, n_probe: int
) -> tuple[Projector, tuple[str, ...]]:
    """Return the projector that gradients are compared by, and warnings about it."""
    if settings.projector is not None:
        return settings.projector.chosen_for(selection.blocks), ()
    size = sum(block.size for block in selection.blocks)
    batch_size = getattr(trainer.train_dataloader, "batch_size", None) or 1
    numbers = size * max(n_probe, batch_size * trainer.accumulate_grad_batches)
    if numbers <= _MAX_NUMBERS:
        return Identity(), ()
    return KroneckerCountSketch().chosen_for(selection.blocks), (
        f"full gradients of {size:,} parameters would take {numbers:,} numbers at once; their "
        "products are estimated from sketches instead. For exact products, pass "
        "`projector=Identity()`, fewer probes or fewer `layers`.",
    )
