"""GradientRecorder: the Lightning callback that records sketches of per-sample gradients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
from pytorch_lightning.utilities import rank_zero_warn
from torch import Tensor
from torch.nn import Parameter

from tda_lightning.callbacks.arguments import RECORDER, require_sensible
from tda_lightning.callbacks.base_callbacks import RecordedRun, RecordingCallback
from tda_lightning.callbacks.budgets import Budgets, Snapshots
from tda_lightning.callbacks.checks import (
    lost_blocks,
    require_one_loader,
    require_supported,
    settled_reduction,
    warn_of,
)
from tda_lightning.callbacks.lightning_trainer import (
    LightningModule,
    Trainer,
    distributed_context,
    loss_scale_of,
)
from tda_lightning.callbacks.run_location import Existing
from tda_lightning.callbacks.stopping import StoppingRecorder
from tda_lightning.callbacks.training_ids import known_ids, warn_of_one_sample, with_new_ids
from tda_lightning.gradients.losses import LabelSchedule, Reduction
from tda_lightning.gradients.parameter_selection import ParameterSelection, row_dtype, unfrozen
from tda_lightning.gradients.row_recorder import RowRecorder
from tda_lightning.gradients.sketching.projectors import KroneckerCountSketch, Projector
from tda_lightning.recording.preconditioning import has_preconditioner
from tda_lightning.recording.sample_ids import IdSource
from tda_lightning.recording.settings import RecordingSettings
from tda_lightning.recording.trained_layers import select_trained_layers
from tda_lightning.recording.training_recorder import TrainingRecorder
from tda_lightning.stores import WritableStore
from tda_lightning.stores.recipe import LeftOut, Recipe


class GradientRecorder(StoppingRecorder):
    """Record, per optimizer step, a sketch of each sample's contribution to the gradient.

    The training is unchanged: weights are bit-identical with and without the callback. After
    training, query the run with :func:`tda_lightning.attribute`.

    Args:
        store: Folder to record into, or a store; by default ``run.tda`` in ``trainer.log_dir``.
            ``recorder.store`` is that of the last training. ``fast_dev_run`` leaves no files.
        projector: Sketches the gradients.
        layers: Names of the modules or parameters to record, with ``*`` for any characters, or with
            ``!`` in front to leave them out: ``["!*.norm"]`` records all others. By default all
            that are trained and supported.
        every_n_steps: Record every n-th optimizer step.
        max_gb: Largest size of the run in gigabytes; fewer steps are recorded if necessary.
        max_overhead: Largest time that recording may add, as a share of the training time (0.1 for
            10 %); fewer steps are recorded if necessary. More passes in the first batch measure it.
        preconditioner: With ``"optimizer"``, rows are in the coordinates of an adaptive optimizer,
            in which its steps are gradient steps (:mod:`tda_lightning.recording.preconditioning`).
            With ``"none"``, rows are raw. No effect for SGD with one learning rate.
        curvature: With ``"fisher"``, one more backward pass per step records rows for labels that
            are sampled from the model's own predictions. They make answers more accurate.
        curvature_share: Share of the steps with such a pass, after the first 20, which all have it.
        audit: Compare the recorded rows with the actual gradient and update every n-th recorded
            step, and always in the first. ``tda-lightning audit`` shows the results.
        snapshots: Save the weights before every n-th optimizer step, or before these steps. Queries
            can be evaluated at them: ``attribute(..., at=index)``. ``"auto"`` saves them after each
            fifth of a training of known length, if all take less than 64 MiB or a tenth of the
            rows; they make answers more accurate. 0 saves none.
        sample_ids: A key of the batch, or a function of the batch, that gives each sample's id. By
            default ids are indices into the dataset, inferred from the sampler.
        reduction: Whether the training loss is the mean or the sum over its samples. By default, it
            is inferred from the first loss; a mean, if its graph leaves that open.
        batch_dims: Axis of the samples in layers whose names match a pattern, if it is not the
            first: ``{"encoder.*": 1}``. ``"flattened"`` is for inputs that join it with other axes.
        existing: What to do if ``store`` holds a run that this training does not continue.
            ``"refuse"``, the default for a named store, raises an error; ``"replace"`` deletes that
            run; ``"number"``, the default without a name, records into ``run-2.tda`` and so on. A
            resumed training, or one that is fitted further, continues the run that it began.

    Raises:
        ValueError: If an argument is invalid; or within the first 20 steps, if something cannot be
            recorded faithfully. Later, recording stops with a warning, and the training goes on.
        FileExistsError: Before the first batch, if ``store`` holds a run or something else.
    """

    _name = "GradientRecorder"

    def __init__(
        self,
        store: str | Path | WritableStore | None = None,
        *,
        projector: Projector = KroneckerCountSketch(),
        layers: Sequence[str] | None = None,
        every_n_steps: int = 1,
        max_gb: float | None = None,
        max_overhead: float | None = None,
        preconditioner: Literal["optimizer", "none"] = "optimizer",
        curvature: Literal["fisher", "none"] = "none",
        curvature_share: float = 1.0,
        audit: int = 0,
        snapshots: Snapshots = "auto",
        sample_ids: IdSource | None = None,
        reduction: Reduction | None = None,
        batch_dims: Mapping[str, int | Literal["flattened"]] | None = None,
        existing: Existing | None = None,
    ) -> None:
        require_sensible(locals(), RECORDER)
        RecordedRun.__init__(self, store, existing)
        RecordingCallback.__init__(self, sample_ids)
        self.projector = projector
        self.layers = layers
        self.every_n_steps = every_n_steps
        self.max_gb = max_gb
        self.max_overhead = max_overhead
        self.preconditioner = preconditioner
        self.curvature = curvature
        self.curvature_share = curvature_share
        self.audit = audit
        self.snapshots = snapshots
        self.reduction = reduction
        self.batch_dims = dict(batch_dims or {})
        self._sampled = curvature_share if curvature == "fisher" else 0.0
        self._budgets = self._new_budgets()
        self._recipe: Recipe | None = None  # Only during training.

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check that everything can be recorded, begin the run and attach the hooks."""
        require_supported(trainer, pl_module, self.preconditioner)
        if self.sample_ids is None:
            require_one_loader(trainer)
        self._choose_store(trainer)
        self._budgets = self._new_budgets()
        recorder = self._create_recorder(trainer, pl_module)
        recipe = self._create_recipe(trainer, pl_module, recorder)
        recipe = self._budgets.begin(trainer, pl_module, recipe)
        state, preconditioner = self._writer.begin(trainer, recipe)
        recorder.resume(trainer.global_step, state.get("lanes", ()), preconditioner)
        if len(self.store):  # The audit of an earlier `fit` has accepted it.
            recorder.accept()
        self._ledger.start_training(trainer.global_step)
        warn_of_one_sample(self._ledger)
        warn_of(recipe.left_out)
        self._recipe = recipe
        self._budgets.describe(trainer, recipe)
        self._attach(trainer, recorder, recipe.every_n_steps)

    def _new_budgets(self) -> Budgets:
        limits = (self.max_gb, self.max_overhead, self.snapshots)
        return Budgets(*limits, self._sampled, self.store, self._writer)

    def _create_recorder(self, trainer: Trainer, model: LightningModule) -> TrainingRecorder:
        continued = self._writer.continued_recipe(trainer)
        self._is_reduction_settled = continued is not None
        selection = select_trained_layers(model, self.layers, trainer.optimizers, continued)
        lost = [] if continued is None else lost_blocks(continued)
        selection = replace(selection, left_out=(*selection.left_out, *lost))
        projector = self.projector.chosen_for(selection.blocks)
        labels: Literal["given", "sampled"] = "sampled" if self._sampled else "given"
        is_preconditioned = any(map(has_preconditioner, trainer.optimizers))

        def rows(part: ParameterSelection) -> RowRecorder:
            dtype, names = row_dtype(model), [entry.name for entry in lost]
            rows = RowRecorder(model, part, self.batch_dims, projector, dtype, labels, names)
            return self._writer.watched(rows)

        settings = RecordingSettings(
            optimization="automatic" if model.automatic_optimization else "manual",
            rows=rows,
            reduction=self.reduction or (continued.reduction if continued else "mean"),
            preconditioner=self.preconditioner if is_preconditioned else "none",
            audit=self.audit,
            distributed=distributed_context(trainer),
            warn=rank_zero_warn,
            leave_out=self._leave_out,
            note_unfrozen=partial(self._note_unfrozen, model),
            labels=LabelSchedule(self.curvature_share) if self._sampled else None,
        )
        keep = self._writer.append
        return TrainingRecorder(trainer.optimizers, selection, projector, settings, keep)

    def _leave_out(self, entries: Sequence[LeftOut]) -> None:
        """Name parameters that turned out not to be recordable, here and in the recipe."""
        warn_of(entries)
        if self._recipe is not None and not len(self.store):
            self._recipe = replace(self._recipe, left_out=(*self._recipe.left_out, *entries))
            self._writer.amend(self._recipe)

    def _note_unfrozen(self, model: LightningModule, parameters: Sequence[Parameter]) -> None:
        """Name parameters that are trained from now on in the recipe; a warning has done so."""
        recipe = self.store.recipe
        if entries := unfrozen(model, parameters, recipe):
            self._recipe = replace(recipe, left_out=(*recipe.left_out, *entries))
            self._writer.amend(self._recipe)

    def _create_recipe(
        self, trainer: Trainer, model: LightningModule, recorder: TrainingRecorder
    ) -> Recipe:
        return Recipe(
            blocks=recorder.selection.blocks,
            left_out=recorder.selection.left_out,
            projector=recorder.projector.to_dict(),
            dimension=recorder.rows.dimension,
            widths=recorder.rows.widths,
            dtype="float64" if row_dtype(model) == torch.float64 else "float32",
            reduction=recorder.settings.reduction,
            batch_dims=self.batch_dims,
            preconditioner=recorder.settings.preconditioner,
            curvature=self.curvature,
            ranks=trainer.world_size,
            every_n_steps=self.every_n_steps,
            train_ids=known_ids(trainer, self._ledger, self._writer.continued_recipe(trainer)),
            model=type(model).__name__,
            versions={name: version(name) for name in ("tda_lightning", "torch")},
        )

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Expect the first batch of a new pass, perhaps over other data than before."""
        super().on_train_epoch_start(trainer, pl_module)
        if self._recorder is not None:
            recipe = with_new_ids(trainer, self._ledger, self.store.recipe)
            if recipe is not self.store.recipe:
                self._recipe = recipe
                self._writer.amend(recipe)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Save a snapshot if one is due, and prepare for the forward pass of the batch."""
        if self._recorder is not None:
            chosen, finish_steps = self._budgets.snapshots, self._recorder.finish_steps
            self._writer.save_snapshot(trainer, pl_module, chosen, finish_steps)
            super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
            if self._budgets.is_measuring:
                self._budgets.start_forward(pl_module, self._recorder)

    def _start_backward(
        self, recorder: TrainingRecorder, trainer: Trainer, model: LightningModule, loss: Tensor
    ) -> None:
        """Prepare for the backward pass of the loss; in the first batch, measure its time."""
        assert self._recipe is not None
        self._show_rows(recorder)
        self._settle_reduction(trainer, recorder, self._recipe, loss)
        start_backward = recorder.start_backward
        if self._budgets.is_measuring:
            self._recipe = self._budgets.choose_stride(trainer, model, recorder, loss, self._recipe)
            start_backward = partial(self._budgets.start_backward, recorder)
        with self._ledger.checking_number():
            start_backward(loss, loss_scale_of(trainer))
        self._correct_order(recorder, loss)

    def _settle_reduction(
        self, trainer: Trainer, recorder: TrainingRecorder, recipe: Recipe, loss: Tensor
    ) -> None:
        """Infer the reduction from the first recorded loss."""
        if self._is_reduction_settled or not recorder.is_recording():
            return
        self._is_reduction_settled = True
        self._recipe = settled_reduction(trainer, recorder, loss, self.reduction, recipe)
        if self._recipe is not recipe:
            self._writer.amend(self._recipe)

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Collect the rows of the batch."""
        super().on_after_backward(trainer, pl_module)
        if self._recorder is not None and self._budgets.is_measuring:
            self._budgets.end_backward(self._recorder)

    def _save(self) -> None:
        self._writer.close()
