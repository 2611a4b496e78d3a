"""GradientRecorder: the Lightning callback that records what each sample did to each step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer

from tda_lightning.callbacks.arguments import RECORDER, require_sensible
from tda_lightning.callbacks.budgets import Budgets
from tda_lightning.callbacks.checks import require_one_loader, require_supported
from tda_lightning.callbacks.cost_estimate import describe_snapshots
from tda_lightning.callbacks.first_batch import FirstBatch
from tda_lightning.callbacks.lightning_types import LightningModule, Trainer
from tda_lightning.callbacks.method_watchers import watch_clipping, watch_loaders
from tda_lightning.callbacks.run_writer import RunWriter
from tda_lightning.callbacks.strategies import distributed_context, loss_scale_of
from tda_lightning.gradients.layers import LayerSelection
from tda_lightning.gradients.row_recorder import RowRecorder, row_dtype
from tda_lightning.gradients.sketching.projectors import KroneckerCountSketch, Projector
from tda_lightning.recording.optimizer_layers import select_trained_layers
from tda_lightning.recording.optimizer_recorder import RecordingSettings
from tda_lightning.recording.preconditioning import has_preconditioner
from tda_lightning.recording.sample_ids import IdSource, SampleLedger
from tda_lightning.recording.training_recorder import TrainingRecorder
from tda_lightning.stores import HDF5Store, WritableStore
from tda_lightning.stores.recipe import Recipe, ranges_of


class GradientRecorder(pl.Callback):
    """Record, per optimizer step, a sketch of what every sample contributed to the gradient.

    The training itself is not touched: weights come out bit-identical with and without the
    callback. Afterwards, ask with :func:`tda_lightning.attribute`.

    Args:
        store: Folder to record into, or a store.
        projector: How gradients become sketch rows.
        layers: Names of the modules to record, with ``*`` for any characters; by default all that
            are trained and supported.
        every_n_steps: Record every n-th optimizer step.
        max_gb: Record fewer steps, if the run would otherwise take more gigabytes of disk.
        max_overhead: Record fewer steps, if recording would otherwise add more than this share to
            the time of training (0.1 for 10 %). That is found out by four more backward passes
            through the first batch, six with sampled labels.
        preconditioner: Whether rows are in the coordinates of an adaptive optimizer, in which its
            steps are gradient steps (see :mod:`tda_lightning.recording.preconditioning`), or raw.
            Without effect for SGD with one learning rate.
        curvature: With ``"fisher"``, one more backward pass per step records rows from labels that
            are drawn from the model's own predictions, which make later answers more accurate.
        curvature_share: Share of each batch that these rows are recorded of.
        audit: Compare the recorded rows with the real gradient and the real update every so many
            recorded steps (always in the first); ``tda-lightning audit`` shows what was found.
        snapshots: Keep the weights before every n-th optimizer step, or before the steps of these
            indices, so that queries can be asked about them: ``attribute(..., at=index)``.
        sample_ids: A key of the batch, or a function of the batch, that gives each sample's id. By
            default the index in the dataset, learnt from the sampler.
        reduction: How the training loss combines its samples.
        batch_dims: Axis of the samples in layers whose names match a pattern, where it is not the
            first: ``{"encoder.*": 1}``; or ``"flattened"`` for layers that see it joined with
            others, as in ``x.reshape(n * length, -1)``.
        existing: What to do if ``store`` holds a run that this training does not continue. A
            training that is resumed, or fitted further, continues the run that it has begun.

    Raises:
        ValueError: If an argument makes no sense; or before the first batch, if something cannot be
            recorded faithfully.
        FileExistsError: Before the first batch, if ``store`` holds a run or something else.
    """

    def __init__(
        self,
        store: str | Path | WritableStore,
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
        snapshots: int | Sequence[int] = 0,
        sample_ids: IdSource | None = None,
        reduction: Literal["mean", "sum"] = "mean",
        batch_dims: Mapping[str, int | Literal["flattened"]] | None = None,
        existing: Literal["refuse", "replace"] = "refuse",
    ) -> None:
        require_sensible(locals(), RECORDER)
        self.store = store if isinstance(store, WritableStore) else HDF5Store(store)
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
        self.sample_ids = sample_ids
        self.reduction = reduction
        self.batch_dims = dict(batch_dims or {})
        self.existing = existing
        self._sampled = curvature_share if curvature == "fisher" else 0.0
        self._writer = RunWriter(self.store, existing)
        self._budgets = Budgets(max_gb, max_overhead, self._sampled, self.store, self._writer)
        self._ledger = SampleLedger(sample_ids)
        self._recorder: TrainingRecorder | None = None
        self._first = FirstBatch()
        self._undo: list[Callable[[], None]] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Make the training loader's sampler remember what it draws."""
        if stage != "fit":
            return
        stop = watch_loaders(
            trainer, lambda loader: self._ledger.watch(loader, lambda: trainer.training)
        )
        self._undo = [stop, self._ledger.release]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check that everything can be recorded, begin the run and attach the hooks."""
        require_supported(trainer, pl_module, self.preconditioner)
        if self.sample_ids is None:
            require_one_loader(trainer)
        recorder = self._make_recorder(trainer, pl_module)
        recipe = self._recipe_for(trainer, pl_module, recorder)
        recipe = self._budgets.begin(trainer, pl_module, recipe)
        state, preconditioner = self._writer.begin(trainer, recipe)
        recorder.resume(trainer.global_step, state.get("lanes", ()), preconditioner)
        self._ledger.start_training(trainer.global_step)
        for entry in recipe.left_out:
            rank_zero_warn(f"GradientRecorder: {entry.describe()}")
        self._budgets.describe(trainer, recipe)
        for line in describe_snapshots(trainer, pl_module, self.snapshots):
            rank_zero_info(f"GradientRecorder: {line}")
        recorder.attach(recipe.every_n_steps)
        self._undo.append(watch_clipping(trainer, recorder.before_clipping))
        self._recorder, self._first = recorder, FirstBatch()

    def _make_recorder(self, trainer: Trainer, model: LightningModule) -> TrainingRecorder:
        selection = select_trained_layers(model, self.layers, trainer.optimizers)
        projector = self.projector.chosen_for(selection.blocks)
        has_own = any(has_preconditioner(optimizer) for optimizer in trainer.optimizers)

        def rows(part: LayerSelection, passes: Literal["one", "several"]) -> RowRecorder:
            dtype = row_dtype(model)
            return RowRecorder(
                model, part, self.batch_dims, projector, dtype, self._sampled, passes
            )

        settings = RecordingSettings(
            optimization="automatic" if model.automatic_optimization else "manual",
            rows=rows,
            reduction=self.reduction,
            preconditioner=self.preconditioner if has_own else "none",
            audit=self.audit,
            distributed=distributed_context(trainer),
            warn=rank_zero_warn,
        )
        return TrainingRecorder(
            trainer.optimizers, selection, projector, settings, self._writer.append
        )

    def _recipe_for(
        self, trainer: Trainer, model: LightningModule, recorder: TrainingRecorder
    ) -> Recipe:
        train_ids = self._ledger.train_ids
        return Recipe(
            blocks=recorder.selection.blocks,
            left_out=recorder.selection.left_out,
            projector=recorder.projector.to_dict(),
            dimension=recorder.dimension,
            widths=recorder.widths,
            dtype="float64" if row_dtype(model) == torch.float64 else "float32",
            reduction=self.reduction,
            batch_dims=self.batch_dims,
            preconditioner=recorder.settings.preconditioner,
            curvature=self.curvature,
            ranks=trainer.world_size,
            every_n_steps=self.every_n_steps,
            train_ids=None if train_ids is None else ranges_of(train_ids),
            model=type(model).__name__,
            versions={name: version(name) for name in ("tda_lightning", "torch")},
        )

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Expect the first batch of a new pass over the data."""
        self._ledger.start_epoch()

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Name the samples of the batch, and watch its forward pass if its step is due."""
        if self._recorder is not None:
            sample_ids = self._ledger.name(batch, batch_idx)
            share = 1 / trainer.accumulate_grad_batches
            self._writer.keep_weights(trainer, pl_module, self.snapshots)
            self._recorder.start_batch(trainer.global_step, sample_ids, share)
            self._budgets.start_forward(pl_module)
            if self.max_overhead is None:
                self._first.start(pl_module, self._recorder)

    def on_before_zero_grad(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        """Forget rows of gradients that were never used: a model may decline to take a step."""
        if self._recorder is not None:
            self._recorder.forget_gradients()

    def on_before_backward(
        self, trainer: Trainer, pl_module: LightningModule, loss: Tensor
    ) -> None:
        """Listen to the backward pass of the loss."""
        if self._recorder is not None:
            self._budgets.settle(trainer, pl_module, self._recorder, loss)
            self._first.start_backward(self._recorder, loss, loss_scale_of(trainer))

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Collect the rows of the batch."""
        if self._recorder is not None:
            self._recorder.end_backward()
            self._first.end_backward(self._recorder)

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        """Read the learning rate now: at the end of the batch its scheduler has already stepped."""
        if self._recorder is not None:
            self._recorder.before_step(trainer.global_step, trainer.current_epoch, optimizer)

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Forget what led to no step."""
        if self._recorder is not None:
            self._recorder.end_batch()
            if self._writer.has_failed and trainer.world_size == 1:
                self._close()

    @property
    def state_key(self) -> str:
        """Name of this recorder in a checkpoint: recorders are told apart by their stores."""
        return self._generate_state_key(store=str(getattr(self.store, "path", "")))

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint has to know of the run, in builtins."""
        recorder = {} if self._recorder is None else {"lanes": self._recorder.state()}
        return {**state, **recorder} if (state := self._writer.state()) else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Learn which run a checkpoint belongs to; it is continued when training starts."""
        self._writer.load_state(state_dict)

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Seal every step that the checkpoint's weights have taken, before it is written."""
        if self._recorder is not None:
            self._writer.seal_together(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Seal the run and remove everything that was installed."""
        self._close()
        self._writer.finish(trainer)

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Do the same if training is interrupted or fails."""
        self._close()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Do the same if training never began."""
        self._close()

    def _close(self) -> None:
        undo, self._undo = self._undo, []
        for action in undo:
            action()
        if self._recorder is not None:
            recorder, self._recorder = self._recorder, None
            recorder.detach()
            self._writer.seal()
