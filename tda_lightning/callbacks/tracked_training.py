"""Followed: what a tracker follows in one training, and what that costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Int
from pytorch_lightning.utilities import rank_zero_warn

from tda_lightning.callbacks.lightning_types import LightningModule, Trainer
from tda_lightning.callbacks.probe import Probe
from tda_lightning.callbacks.strategies import distributed_context
from tda_lightning.gradients.layers import LayerSelection
from tda_lightning.gradients.row_recorder import RowRecorder, row_dtype
from tda_lightning.gradients.sketching.projectors import Identity, KroneckerCountSketch, Projector
from tda_lightning.passes.model_state import Mode
from tda_lightning.recording.contribution_recorder import ContributionRecorder
from tda_lightning.recording.contribution_table import ContributionTable, Period
from tda_lightning.recording.optimizer_layers import select_trained_layers
from tda_lightning.recording.optimizer_recorder import OptimizerRecorder, RecordingSettings
from tda_lightning.recording.preconditioning import JointPreconditioner, has_preconditioner
from tda_lightning.results.contributions import Contributions
from tda_lightning.stores.recipe import SampleAxis

# Whole gradients of a step's samples, or of all probes, may hold so many numbers.
_MOST_NUMBERS = 10_000_000


@dataclass(frozen=True)
class TrackerSettings:
    """What a tracker was asked for; see there."""

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
    """One training that is followed.

    Attributes:
        tracking: Adds up what its steps do for the probe.
        probe: The probe.
        warnings: What the user should know beforehand.
        facts: Where the contributions come from.
        every_n_steps: How many steps a tracked one stands for.
    """

    recorder: ContributionRecorder
    probe: Probe
    warnings: tuple[str, ...]
    facts: Mapping[str, str]
    every_n_steps: int

    def contributions(self) -> Contributions:
        """Return what has been found so far."""
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
        """Return what a checkpoint should know."""
        return {**self.recorder.state(), "facts": self._expected()}

    def resume(self, state: Mapping[str, Any]) -> None:
        """Go on where :meth:`state` was saved.

        Raises:
            ValueError: If something else was followed then.
        """
        for name, now in self._expected().items():
            before = state["facts"][name]
            if before != now:
                raise ValueError(
                    f"The tracker's `{name}` was {before!r} when the checkpoint was saved and is "
                    f"now {now!r}; expected what it was, since new contributions are added to "
                    "those. Restore it, or follow into a new file from the beginning."
                )
        self.recorder.resume(state)

    def _expected(self) -> dict[str, str]:
        return {**self.facts, "every_n_steps": str(self.every_n_steps)}

    def describe_cost(self) -> str:
        """Say in one line what following takes."""
        n_probe, n_train = len(self.probe), len(self.recorder.table.train_ids)
        stride = "" if self.every_n_steps == 1 else f" of every {self.every_n_steps} steps"
        passes = self.probe.n_batches
        known = f"{n_probe} x {n_train:,} numbers, {8 * n_probe * n_train / 2**20:,.1f} MiB,"
        table = known if n_train else f"{n_probe} numbers for each sample that comes"
        return (
            f"following {n_probe} probes in {passes} more forward and backward "
            f"pass{'es' * (passes > 1)} in one step{stride}, with {self.facts['projector']}; "
            f"a table of {table} per {self.facts['period']}."
        )


def require_trackable(trainer: Trainer, module: LightningModule) -> None:
    """Raise if this training has no single moment at which a probe can pass.

    Raises:
        ValueError: Naming the setting, and what to do.
    """
    if not module.automatic_optimization:
        raise ValueError(
            "`ContributionTracker` cannot follow manual optimization, where a probe that passes "
            "through `training_step` would be trained on; expected automatic optimization. Record "
            "with `GradientRecorder` instead, and ask afterwards."
        )
    if trainer.world_size > 1:
        raise ValueError(
            f"`ContributionTracker` cannot follow {trainer.world_size} processes; expected one. "
            "Set `Trainer(devices=1)`, or record with `GradientRecorder` and ask afterwards."
        )


def follow(
    settings: TrackerSettings,
    trainer: Trainer,
    model: LightningModule,
    probe: Probe,
    train_ids: Int[np.ndarray, " n_train"] | None,
) -> TrackedTraining:
    """Prepare to follow a training.

    Args:
        settings: What the user asked for.
        trainer: The trainer, about to start.
        model: The model.
        probe: What it is followed for.
        train_ids: Ids of the training samples, if they are known beforehand.
    """
    (optimizer,) = trainer.optimizers
    selection = select_trained_layers(model, settings.layers, [optimizer])
    projector, remark = _projector(settings, trainer, selection, len(probe))
    preconditioner = settings.preconditioner if has_preconditioner(optimizer) else "none"
    dtype = row_dtype(model)

    def rows(part: LayerSelection, passes: Literal["one", "several"]) -> RowRecorder:
        return RowRecorder(model, part, settings.batch_dims, projector, dtype, 0.0, passes)

    recording_settings = RecordingSettings(
        optimization="automatic",
        rows=rows,
        reduction=settings.reduction,
        preconditioner=preconditioner,
        audit=0,
        distributed=distributed_context(trainer),
        warn=rank_zero_warn,
    )
    whole = JointPreconditioner(selection.blocks)
    optimizer_recorder = OptimizerRecorder(optimizer, selection, recording_settings, whole)
    ids = torch.empty(0, dtype=torch.int64) if train_ids is None else torch.as_tensor(train_ids)
    table = ContributionTable(len(probe), ids, settings.period)
    described = ", ".join(f"{key}={value}" for key, value in projector.to_dict().items())
    facts = {
        "model": type(model).__name__,
        "optimizer": type(optimizer).__name__,
        "projector": described,
        "rows": f"{optimizer_recorder.rows.dimension} x {dtype}, coordinates of {preconditioner}",
        "weights": "those of each tracked step",
        "mode": settings.mode,
        "period": f"{settings.period} steps"
        if isinstance(settings.period, int)
        else settings.period,
    }
    warnings = (*remark, *(entry.describe() for entry in selection.left_out))
    recorder = ContributionRecorder(optimizer_recorder, whole, table, settings.every_n_steps)
    return TrackedTraining(recorder, probe, warnings, facts, settings.every_n_steps)


def _projector(
    settings: TrackerSettings, trainer: Trainer, selection: LayerSelection, n_probe: int
) -> tuple[Projector, tuple[str, ...]]:
    """Return what gradients are compared with, and what is to be said of it."""
    if settings.projector is not None:
        return settings.projector.chosen_for(selection.blocks), ()
    size = sum(block.size for block in selection.blocks)
    batch_size = getattr(trainer.train_dataloader, "batch_size", None) or 1
    most = size * max(n_probe, batch_size * trainer.accumulate_grad_batches)
    if most <= _MOST_NUMBERS:
        return Identity(), ()
    return KroneckerCountSketch().chosen_for(selection.blocks), (
        f"whole gradients of {size:,} parameters would take {most:,} numbers at once; estimating "
        "their products from sketches. Pass `projector=Identity()` for exact ones, fewer probes, "
        "or fewer `layers`.",
    )
