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
from tda_lightning.callbacks.strategies import processes_of
from tda_lightning.gradients.layers import Survey
from tda_lightning.gradients.row_recorder import RowRecorder, row_dtype
from tda_lightning.gradients.sketching.projectors import Identity, KroneckerCountSketch, Projector
from tda_lightning.passes.model_state import Mode
from tda_lightning.recording.contribution_recorder import Tracking
from tda_lightning.recording.contribution_table import Period, Table
from tda_lightning.recording.optimizer_layers import survey_trained
from tda_lightning.recording.optimizer_recorder import Lane, Settings
from tda_lightning.recording.preconditioning import WholeCoordinates, has_coordinates
from tda_lightning.results.contributions import Contributions
from tda_lightning.stores.recipe import SampleAxis

# Whole gradients of a step's samples, or of all probes, may hold so many numbers.
_MOST_NUMBERS = 10_000_000


@dataclass(frozen=True)
class Wishes:
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
class Followed:
    """One training that is followed.

    Attributes:
        tracking: Adds up what its steps do for the probe.
        probe: The probe.
        warnings: What the user should know beforehand.
        facts: Where the contributions come from.
        every_n_steps: How many steps a tracked one stands for.
    """

    tracking: Tracking
    probe: Probe
    warnings: tuple[str, ...]
    facts: Mapping[str, str]
    every_n_steps: int

    def contributions(self) -> Contributions:
        """Return what has been found so far."""
        table = self.tracking.table
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
        return {**self.tracking.state(), "facts": self._expected()}

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
        self.tracking.resume(state)

    def _expected(self) -> dict[str, str]:
        return {**self.facts, "every_n_steps": str(self.every_n_steps)}

    def describe_cost(self) -> str:
        """Say in one line what following takes."""
        n_probe, n_train = len(self.probe), len(self.tracking.table.train_ids)
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
    wishes: Wishes,
    trainer: Trainer,
    model: LightningModule,
    probe: Probe,
    train_ids: Int[np.ndarray, " n_train"] | None,
) -> Followed:
    """Prepare to follow a training.

    Args:
        wishes: What the user asked for.
        trainer: The trainer, about to start.
        model: The model.
        probe: What it is followed for.
        train_ids: Ids of the training samples, if they are known beforehand.
    """
    (optimizer,) = trainer.optimizers
    surveyed = survey_trained(model, wishes.layers, [optimizer])
    projector, remark = _projector(wishes, trainer, surveyed, len(probe))
    coordinates = wishes.preconditioner if has_coordinates(optimizer) else "none"
    dtype = row_dtype(model)

    def rows(part: Survey, passes: Literal["one", "several"]) -> RowRecorder:
        return RowRecorder(model, part, wishes.batch_dims, projector, dtype, 0.0, passes)

    settings = Settings(
        optimization="automatic",
        rows=rows,
        reduction=wishes.reduction,
        preconditioner=coordinates,
        audit=0,
        processes=processes_of(trainer),
        warn=rank_zero_warn,
    )
    whole = WholeCoordinates(surveyed.blocks)
    lane = Lane(optimizer, surveyed, settings, whole)
    ids = torch.empty(0, dtype=torch.int64) if train_ids is None else torch.as_tensor(train_ids)
    table = Table(len(probe), ids, wishes.period)
    described = ", ".join(f"{key}={value}" for key, value in projector.to_dict().items())
    facts = {
        "model": type(model).__name__,
        "optimizer": type(optimizer).__name__,
        "projector": described,
        "rows": f"{lane.rows.dimension} x {dtype}, coordinates of {coordinates}",
        "weights": "those of each tracked step",
        "mode": wishes.mode,
        "period": f"{wishes.period} steps" if isinstance(wishes.period, int) else wishes.period,
    }
    warnings = (*remark, *(entry.describe() for entry in surveyed.left_out))
    tracking = Tracking(lane, whole, table, wishes.every_n_steps)
    return Followed(tracking, probe, warnings, facts, wishes.every_n_steps)


def _projector(
    wishes: Wishes, trainer: Trainer, surveyed: Survey, n_probe: int
) -> tuple[Projector, tuple[str, ...]]:
    """Return what gradients are compared with, and what is to be said of it."""
    if wishes.projector is not None:
        return wishes.projector.chosen_for(surveyed.blocks), ()
    size = sum(block.size for block in surveyed.blocks)
    batch_size = getattr(trainer.train_dataloader, "batch_size", None) or 1
    most = size * max(n_probe, batch_size * trainer.accumulate_grad_batches)
    if most <= _MOST_NUMBERS:
        return Identity(), ()
    return KroneckerCountSketch().chosen_for(surveyed.blocks), (
        f"whole gradients of {size:,} parameters would take {most:,} numbers at once; estimating "
        "their products from sketches. Pass `projector=Identity()` for exact ones, fewer probes, "
        "or fewer `layers`.",
    )
