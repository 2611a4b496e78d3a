"""Budgets: measure the cost of recording, and keep it within limits of disk and time."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from tda_lightning.callbacks.cost_estimate import (
    automatic_snapshots,
    describe_cost,
    describe_snapshots,
    snapshot_bytes,
    stride_within,
)
from tda_lightning.callbacks.lightning_trainer import LightningModule, Trainer
from tda_lightning.callbacks.messages import inform, note
from tda_lightning.callbacks.run_writer import RunWriter
from tda_lightning.recording.timing import BatchTiming, Stopwatch, measure
from tda_lightning.recording.training_recorder import TrainingRecorder
from tda_lightning.stores import WritableStore
from tda_lightning.stores.recipe import Recipe

# Which weights a recorder saves: a stride, 0 for none; the indices of steps; or its own choice.
Snapshots = int | Sequence[int] | Literal["auto"]


class Budgets:
    """Chooses the smallest stride of a run that respects its limits and ``every_n_steps``.

    The stride for a disk limit follows from the recipe, before training. The stride for a time
    limit is measured in the first recorded batch: a plain and a recorded backward pass run through
    the graph of its loss, without any effect, before the real one. Without such a limit that batch
    is measured too, without any extra work. The time of recording is then that of the preparation
    of the backward pass plus that of making rows during it.

    Args:
        max_gb: Largest size on disk, in units of 10^9 bytes.
        max_overhead: Largest time that recording may add, as a share of the training time.
        snapshots: Those that the user has chosen, or ``"auto"``.
        sampled: Share of the steps at which labels are sampled too.
        store: The store of the run.
        writer: Writes the run into it.

    Attributes:
        is_measuring: Whether the first recorded batch is still to be measured.
        snapshots: A stride, 0 for none, or the indices of steps.
    """

    def __init__(
        self,
        max_gb: float | None,
        max_overhead: float | None,
        snapshots: Snapshots,
        sampled: float,
        store: WritableStore,
        writer: RunWriter,
    ) -> None:
        self._max_gb = max_gb
        self._max_overhead = max_overhead
        self._are_snapshots_chosen = snapshots != "auto"
        self.snapshots: int | Sequence[int] = 0 if snapshots == "auto" else snapshots
        self._sampled = sampled
        self._store = store
        self._writer = writer
        # The recipe whose stride is chosen in the first batch, until it is.
        self._undecided: Recipe | None = None
        self.is_measuring = False
        self._stopwatch: Stopwatch | None = None  # since the start of a recorded batch
        self._preparation = 0.0
        self._notes: tuple[str, ...] = ()

    def begin(self, trainer: Trainer, model: LightningModule, recipe: Recipe) -> Recipe:
        """Return the recipe with the stride that can be chosen before the first batch.

        Raises:
            ValueError: If a limit cannot be kept.
        """
        if self._max_overhead is not None and not model.automatic_optimization:
            raise ValueError(
                "`max_overhead` cannot be kept in manual optimization, where a step may take any "
                "number of passes; expected automatic optimization. Set `every_n_steps=` instead."
            )
        reserved = 0.0
        if self._are_snapshots_chosen:
            self._notes = tuple(describe_snapshots(trainer, model, self.snapshots))
        else:
            limits = (self._sampled, self._store, self._max_gb)
            self.snapshots = automatic_snapshots(trainer, model, recipe, *limits)
            reserved = len(self.snapshots) * snapshot_bytes(model) / 1e9
        self._undecided = None
        self.is_measuring = model.automatic_optimization and self._max_overhead is None
        if self._max_gb is None and self._max_overhead is None:
            return recipe
        continued = self._writer.continued_recipe(trainer)
        if continued is not None:  # A continued run keeps its stride.
            return replace(recipe, every_n_steps=continued.every_n_steps)
        if self._max_gb is not None:
            left = self._max_gb - reserved
            stride = stride_within(trainer, recipe, self._sampled, self._store, left)
            recipe = replace(recipe, every_n_steps=stride)
        if self._max_overhead is not None:
            self._undecided, self.is_measuring = recipe, True
        return recipe

    def describe(self, trainer: Trainer, recipe: Recipe, notes: Iterable[str] = ()) -> None:
        """Log one paragraph on the run, once its stride is chosen: ``notes`` wait until then."""
        self._notes = (*self._notes, *notes)
        if self._undecided is not None:
            return
        cost = describe_cost(trainer, recipe, self._sampled, self._store)
        hints = {"size": (self._max_gb, "max_gb"), "time": (self._max_overhead, "max_overhead")}
        limits = [f"its {what} with `{name}`" for what, (limit, name) in hints.items() if not limit]
        hint = [f"Limit {' and '.join(limits)}."] if limits else []
        inform(f"GradientRecorder: {' '.join([cost, *self._notes, *hint])}")
        self._notes = ()

    def start_forward(self, model: LightningModule, recorder: TrainingRecorder) -> None:
        """Prepare for the forward pass of a batch."""
        self._stopwatch = Stopwatch(model.device) if recorder.is_recording() else None

    def choose_stride(
        self,
        trainer: Trainer,
        model: LightningModule,
        recorder: TrainingRecorder,
        loss: Tensor,
        recipe: Recipe,
    ) -> Recipe:
        """Return the recipe, with the stride if it is chosen now: at the first recorded loss."""
        limit, started = self._max_overhead, self._stopwatch
        if self._undecided is None or limit is None or started is None:
            return recipe
        forward = started.seconds()
        self._undecided = self._stopwatch = None
        self.is_measuring = False
        # All processes record the same steps: the first one's measurement decides.
        measured = _timing_of(model, recorder, loss, forward, self._sampled)
        timing = trainer.strategy.broadcast(measured)
        stride = max(recipe.every_n_steps, timing.stride_within(limit))
        recipe = replace(recipe, every_n_steps=stride)
        self._writer.amend(recipe)
        note(f"GradientRecorder: {timing.describe()}.")
        self.describe(trainer, recipe, [f"Recording adds no more than {100 * limit:g} % of time."])
        recorder.record_every(stride)
        return recipe

    def start_backward(self, recorder: TrainingRecorder, loss: Tensor, loss_scale: float) -> None:
        """Let the recorder prepare for the backward pass of the batch's loss, and measure it."""
        begun = 0.0 if self._stopwatch is None else self._stopwatch.seconds()
        recorder.start_backward(loss, loss_scale)
        if self._stopwatch is not None:
            self._preparation = self._stopwatch.seconds() - begun
            recorder.take_time(self._stopwatch.seconds)

    def end_backward(self, recorder: TrainingRecorder) -> None:
        """Log the time of the batch."""
        if self._stopwatch is None:
            return
        recording = self._preparation + recorder.time_taken()
        timing = BatchTiming(max(self._stopwatch.seconds() - recording, 1e-9), recording)
        self._stopwatch, self.is_measuring = None, False
        note(
            f"GradientRecorder: {timing.describe()}. It was measured in the first batch; later "
            "ones take less. Limit it with `max_overhead`."
        )


def _timing_of(
    model: LightningModule,
    recorder: TrainingRecorder,
    loss: Tensor,
    forward: float,
    sampled: float,
) -> BatchTiming:
    """Return the timing of a batch, the mean over steps with and without sampled labels."""
    with_labels = _timing_with(1.0, model, recorder, loss, forward)
    if sampled in (0, 1):
        return with_labels
    without = _timing_with(0.0, model, recorder, loss, forward)
    recording = sampled * with_labels.recording + (1 - sampled) * without.recording
    return replace(without, recording=recording)


def _timing_with(
    label_weight: float,
    model: LightningModule,
    recorder: TrainingRecorder,
    loss: Tensor,
    forward: float,
) -> BatchTiming:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def plain() -> None:
        with recorder.rows.paused():
            torch.autograd.grad(loss, trained, retain_graph=True, allow_unused=True)

    def recorded() -> None:
        recorder.extra_backward(loss, trained, label_weight)

    def row_seconds() -> float:
        recorder.take_time(Stopwatch(loss.device).seconds)
        recorded()
        return recorder.time_taken()

    try:
        return measure(forward, plain, recorded, row_seconds, loss.device)
    except RuntimeError as error:
        raise ValueError(
            "`max_overhead` cannot be kept, since the time of a batch could not be measured: "
            f"{error} Expected a loss that can be differentiated twice over one graph. "
            "Set `every_n_steps=` instead."
        ) from error
