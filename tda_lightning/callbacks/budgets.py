"""Budgets: what a recording may cost in disk and in time, and the stride that keeps to it."""

from __future__ import annotations

from dataclasses import replace

import torch
from pytorch_lightning.utilities import rank_zero_info
from torch import Tensor

from tda_lightning.callbacks.cost_estimate import describe_cost, stride_within
from tda_lightning.callbacks.lightning_types import LightningModule, Trainer
from tda_lightning.callbacks.run_writer import RunWriter
from tda_lightning.gradients.capture import capture_paused
from tda_lightning.recording.timing import BatchTiming, Stopwatch, take_pace
from tda_lightning.recording.training_recorder import TrainingRecorder
from tda_lightning.stores import WritableStore
from tda_lightning.stores.recipe import Recipe


class Budgets:
    """Chooses the stride of a run: as small as it may be, and no smaller than is wanted.

    The stride that fits on the disk is known when training starts. How long recording takes is
    found out in the first batch, when the graph of its loss is there: a plain backward pass and a
    recorded one go through it, aside and to no effect, before the real one does.

    Args:
        max_gb: Most disk, in units of 10^9 bytes.
        max_overhead: Most time, as a share of that of the training.
        sampled: Share of the samples that have a row of sampled labels too.
        store: Where the run is kept.
        keeper: Keeps it there.
    """

    def __init__(
        self,
        max_gb: float | None,
        max_overhead: float | None,
        sampled: float,
        store: WritableStore,
        writer: RunWriter,
    ) -> None:
        self._max_gb = max_gb
        self._max_overhead = max_overhead
        self._sampled = sampled
        self._store = store
        self._writer = writer
        # The recipe whose stride is to be chosen in the first batch.
        self._open: Recipe | None = None
        self._forward: Stopwatch | None = None

    def begin(self, trainer: Trainer, model: LightningModule, recipe: Recipe) -> Recipe:
        """Return the recipe with the stride that is known before the first batch.

        Raises:
            ValueError: If a budget cannot be kept.
        """
        if self._max_overhead is not None and not model.automatic_optimization:
            raise ValueError(
                "`max_overhead` cannot be kept in manual optimization, where a step may take any "
                "number of passes; expected automatic optimization. Set `every_n_steps=` instead."
            )
        self._open = None
        if self._max_gb is None and self._max_overhead is None:
            return recipe
        stride = self._writer.stride_of_run(trainer)
        if stride is not None:  # A run that is continued keeps the one that it was begun with.
            return replace(recipe, every_n_steps=stride)
        recipe = self._within_disk(trainer, recipe)
        if self._max_overhead is not None:
            self._open = recipe
        return recipe

    def describe(self, trainer: Trainer, recipe: Recipe) -> None:
        """Say what the run will take on disk, once its stride is known."""
        if self._open is None:
            cost = describe_cost(trainer, recipe, self._sampled, self._store)
            rank_zero_info(f"GradientRecorder: {cost}")

    def start_forward(self, model: LightningModule) -> None:
        """Expect the forward pass of a batch."""
        if self._open is not None:
            self._forward = Stopwatch(model.device)

    def settle(
        self, trainer: Trainer, model: LightningModule, recorder: TrainingRecorder, loss: Tensor
    ) -> None:
        """Choose the stride, if that is to be done, before the backward pass of a loss."""
        recipe, limit = self._open, self._max_overhead
        if recipe is None or limit is None or self._forward is None or not recorder.is_recording():
            return
        forward = self._forward.seconds()
        self._open = self._forward = None
        # Processes take steps together: one of them says which.
        pace = trainer.strategy.broadcast(_pace_of(model, recorder, loss, forward))
        stride = max(recipe.every_n_steps, pace.stride_within(limit))
        recipe = replace(recipe, every_n_steps=stride)
        self._writer.amend(recipe)
        which = "every step" if stride == 1 else f"one step in {stride:,}"
        rank_zero_info(
            f"GradientRecorder: {pace.describe()}; recording {which}, to add no more than "
            f"{100 * limit:g} %; see `max_overhead`."
        )
        self.describe(trainer, recipe)
        recorder.record_every(stride)

    def _within_disk(self, trainer: Trainer, recipe: Recipe) -> Recipe:
        if self._max_gb is None:
            return recipe
        stride = stride_within(
            trainer, recipe, self._sampled, self._store, self._max_gb, trainer.world_size
        )
        if stride > recipe.every_n_steps:
            rank_zero_info(
                f"GradientRecorder: recording one step in {stride}, to keep within "
                f"{self._max_gb:g} GB; see `max_gb`."
            )
        return replace(recipe, every_n_steps=stride)


def _pace_of(
    model: LightningModule, recorder: TrainingRecorder, loss: Tensor, forward: float
) -> BatchTiming:
    trained = [one for one in model.parameters() if one.requires_grad]

    def plain() -> None:
        with capture_paused():
            torch.autograd.grad(loss, trained, retain_graph=True, allow_unused=True)

    def recorded() -> None:
        recorder.extra_backward(loss, trained)

    def made() -> float:
        recorder.take_time(Stopwatch(loss.device).seconds)
        recorded()
        return recorder.time_taken()

    try:
        return take_pace(forward, plain, recorded, made, loss.device)
    except RuntimeError as error:
        raise ValueError(
            f"`max_overhead` cannot be kept, since no time could be taken: {error} Expected a loss "
            "that can be differentiated twice over one graph. Use checkpointing with "
            "`use_reentrant=False`, or set `every_n_steps=` instead."
        ) from error
