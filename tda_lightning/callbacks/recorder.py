"""GradientRecorder: the Lightning callback that records what each sample did to each step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer

from tda_lightning.callbacks.checks import require_supported
from tda_lightning.callbacks.either import LightningModule, Trainer
from tda_lightning.callbacks.estimate import describe_cost
from tda_lightning.callbacks.keeper import Keeper
from tda_lightning.callbacks.loaders import watch_loaders
from tda_lightning.callbacks.session import Session
from tda_lightning.coordinates import OptimizerCoordinates, has_coordinates
from tda_lightning.layers import survey
from tda_lightning.projectors import KroneckerCountSketch, Projector
from tda_lightning.recipe import Recipe, ranges_of
from tda_lightning.rows import RowRecorder
from tda_lightning.sample_ids import IdSource, SampleLedger
from tda_lightning.stores import HDF5Store, WritableStore


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
        preconditioner: Whether rows are in the coordinates of an adaptive optimizer, in which its
            steps are gradient steps (see :mod:`tda_lightning.coordinates`), or raw. Without effect
            for SGD with one learning rate.
        curvature: With ``"fisher"``, one more backward pass per step records rows from labels that
            are drawn from the model's own predictions, which make later answers more accurate.
        curvature_share: Share of each batch that these rows are recorded of.
        audit: Compare the recorded rows with the real gradient and the real update every so many
            recorded steps (always in the first); ``tda-lightning audit`` shows what was found.
        sample_ids: A key of the batch, or a function of the batch, that gives each sample's id. By
            default the index in the dataset, learnt from the sampler.
        reduction: How the training loss combines its samples.
        batch_dims: Axis of the samples in layers whose names match a pattern, where it is not the
            first: ``{"encoder.*": 1}``; or ``"flattened"`` for layers that see it joined with
            others, as in ``x.reshape(n * length, -1)``.
        existing: What to do if ``store`` holds a run that this training does not continue. A
            training that is resumed, or fitted further, continues the run that it has begun.

    Raises:
        ValueError: Before the first batch, if something cannot be recorded faithfully.
        FileExistsError: Before the first batch, if ``store`` holds a run or something else.
    """

    def __init__(
        self,
        store: str | Path | WritableStore,
        *,
        projector: Projector = KroneckerCountSketch(),
        layers: Sequence[str] | None = None,
        every_n_steps: int = 1,
        preconditioner: Literal["optimizer", "none"] = "optimizer",
        curvature: Literal["fisher", "none"] = "none",
        curvature_share: float = 1.0,
        audit: int = 0,
        sample_ids: IdSource | None = None,
        reduction: Literal["mean", "sum"] = "mean",
        batch_dims: Mapping[str, int | Literal["flattened"]] | None = None,
        existing: Literal["refuse", "replace"] = "refuse",
    ) -> None:
        if every_n_steps < 1:
            raise ValueError(
                f"`every_n_steps` is {every_n_steps}; expected 1 or more, and 1 records every step."
            )
        self.store = store if isinstance(store, WritableStore) else HDF5Store(store)
        self.projector = projector
        self.layers = layers
        if not 0 < curvature_share <= 1:
            raise ValueError(
                f"`curvature_share` is {curvature_share}; expected a share of each batch above 0 "
                "and up to 1. Switch sampled labels off with `curvature='none'`."
            )
        self.every_n_steps = every_n_steps
        self.preconditioner = preconditioner
        self.curvature = curvature
        self.curvature_share = curvature_share
        self.audit = audit
        self.sample_ids = sample_ids
        self.reduction = reduction
        self.batch_dims = dict(batch_dims or {})
        self.existing = existing
        self._keeper = Keeper(self.store, existing)
        self._ledger = SampleLedger(sample_ids)
        self._rows: RowRecorder | None = None
        self._session: Session | None = None
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
        dtype = _row_dtype(pl_module)
        surveyed = survey(pl_module, self.layers)
        blocks, left_out = surveyed.blocks, surveyed.left_out
        projector = self.projector.chosen_for(blocks)
        sampled = self.curvature_share if self.curvature == "fisher" else 0.0
        rows = RowRecorder(pl_module, surveyed, self.batch_dims, projector, dtype, sampled)
        coordinates = None
        if self.preconditioner == "optimizer" and has_coordinates(trainer.optimizers[0]):
            coordinates = OptimizerCoordinates(trainer.optimizers[0], surveyed)
        train_ids = self._ledger.train_ids
        self._ledger.start_training()
        recipe = Recipe(
            blocks=blocks,
            left_out=left_out,
            projector=projector.to_dict(),
            dimension=rows.dimension,
            dtype="float64" if dtype == torch.float64 else "float32",
            reduction=self.reduction,
            batch_dims=self.batch_dims,
            preconditioner="none" if coordinates is None else "optimizer",
            curvature=self.curvature,
            every_n_steps=self.every_n_steps,
            train_ids=None if train_ids is None else ranges_of(train_ids),
            model=type(pl_module).__name__,
            versions={name: version(name) for name in ("tda_lightning", "torch")},
        )
        self._keeper.begin(trainer, recipe)
        for entry in left_out:
            rank_zero_warn(f"GradientRecorder: {entry.describe()}")
        rank_zero_info(f"GradientRecorder: {describe_cost(trainer, recipe, sampled)}")
        self._rows = rows.__enter__()
        self._session = Session(rows, blocks, self.reduction, coordinates, self.audit)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Expect the first batch of a new pass over the data."""
        self._ledger.start_epoch()

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Name the samples of the batch, and watch its forward pass if its step is due."""
        sample_ids = self._ledger.name(batch, batch_idx)
        assert self._session is not None
        if trainer.global_step % self.every_n_steps == 0:
            share = 1 / trainer.accumulate_grad_batches
            self._session.start_batch(trainer.global_step, sample_ids, share)

    def on_before_backward(
        self, trainer: Trainer, pl_module: LightningModule, loss: Tensor
    ) -> None:
        """Listen to the backward pass of the loss."""
        assert self._session is not None
        self._session.start_backward(loss)

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Collect the rows of the batch."""
        assert self._session is not None
        self._session.end_backward()

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        """Read the learning rate now: at the end of the batch its scheduler has already stepped."""
        assert self._session is not None
        self._session.before_step(trainer.global_step, trainer.current_epoch, optimizer)

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Store the step, if one was taken: before any checkpoint of it is written."""
        assert self._session is not None
        self._session.drop_batch()
        step = self._session.after_step()
        if step is not None:
            self._keeper.append(step)

    @property
    def state_key(self) -> str:
        """Name of this recorder in a checkpoint: recorders are told apart by their stores."""
        return self._generate_state_key(store=str(getattr(self.store, "path", "")))

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint has to know of the run, in builtins."""
        return self._keeper.state()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Learn which run a checkpoint belongs to; it is continued when training starts."""
        self._keeper.load_state(state_dict)

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Seal every step that the checkpoint's weights have taken."""
        if self._session is not None:
            self._keeper.seal()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Seal the run and remove everything that was installed."""
        self._close()

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
        if self._rows is not None:
            self._rows.__exit__()
            self._keeper.seal()
        self._rows = self._session = None


def _row_dtype(model: nn.Module) -> torch.dtype:
    is_double = all(one.dtype == torch.float64 for one in model.parameters() if one.requires_grad)
    return torch.float64 if is_double else torch.float32
