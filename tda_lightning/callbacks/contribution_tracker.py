"""ContributionTracker: the Lightning callback that follows what each sample does for a probe."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import pytorch_lightning as pl
from pytorch_lightning.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer

from tda_lightning.callbacks.arguments import TRACKER, require_sensible
from tda_lightning.callbacks.checks import require_one_loader, require_supported
from tda_lightning.callbacks.lightning_types import LightningModule, Trainer
from tda_lightning.callbacks.method_watchers import watch_clipping, watch_loaders
from tda_lightning.callbacks.probe import Probe, read_probe
from tda_lightning.callbacks.strategies import loss_scale_of
from tda_lightning.callbacks.tracked_training import (
    TrackedTraining,
    TrackerSettings,
    follow,
    require_trackable,
)
from tda_lightning.gradients.sketching.projectors import Projector
from tda_lightning.passes.model_state import Mode
from tda_lightning.recording.contribution_table import Period
from tda_lightning.recording.sample_ids import IdSource, SampleLedger
from tda_lightning.results.contributions import Contributions
from tda_lightning.results.scores import Scores


class ContributionTracker(pl.Callback):
    r"""Follow, live, how much every training sample lowers the loss of each probe.

    In every tracked step, before the optimizer moves, the probes' gradients are taken at the
    weights of that moment, and each sample of the step is credited with

    .. math:: \eta_t \, \langle \nabla \ell_q(\theta_t), \, g_i^{(t)} \rangle

    (first-order in-run data Shapley, Wang et al. 2024), where :math:`g_i^{(t)}` is what it added to
    the gradient as the optimizer used it. Under Adam and its like, the inner product is the one of
    the optimizer's coordinates (:mod:`tda_lightning.recording.preconditioning`). What momentum
    carries on is credited to the step in which it arose. The training itself is not touched.

    Args:
        probe: A batch as the training loader yields them, or a ``DataLoader`` of such batches in a
            fixed order. It is read once.
        store: File to keep the contributions in (``.npz``), written at the end of every epoch; its
            name is that of the logged curves ``<name>/loss``, ``<name>/decrease`` (of the probes'
            mean loss by the step) and ``<name>/negative_share`` (of the contributions).
        every_n_steps: Track every n-th optimizer step, which then stands for so many.
        period: What is summed up together: the steps of an epoch, of the run, or so many.
        projector: How gradients are compared. By default whole, so that products are exact, where
            the rows of a step are at most ten million numbers, else by
            :class:`~tda_lightning.KroneckerCountSketch`, with a warning.
        layers: Names of the modules to track, with ``*`` for any characters; by default all that
            are trained and supported.
        preconditioner: Whether to compare in the coordinates of an adaptive optimizer.
        mode: Whether the model acts as in evaluation or as in training while probes pass through.
        sample_ids: A key of the batch, or a function of the batch, that gives each sample's id. By
            default the index in the dataset, learnt from the sampler.
        reduction: How the training loss combines its samples.
        batch_dims: Axis of the samples in layers whose names match a pattern, where it is not the
            first.
        existing: What to do if ``store`` exists and this training does not continue it.

    Raises:
        ValueError: If an argument makes no sense; or before the first batch, if something cannot be
            followed faithfully.
        FileExistsError: Before the first batch, if ``store`` exists.
    """

    def __init__(
        self,
        probe: Any,
        store: str | Path,
        *,
        every_n_steps: int = 1,
        period: Period = "epoch",
        projector: Projector | None = None,
        layers: Sequence[str] | None = None,
        preconditioner: Literal["optimizer", "none"] = "optimizer",
        mode: Mode = "eval",
        sample_ids: IdSource | None = None,
        reduction: Literal["mean", "sum"] = "mean",
        batch_dims: Mapping[str, int | Literal["flattened"]] | None = None,
        existing: Literal["refuse", "replace"] = "refuse",
    ) -> None:
        require_sensible(locals(), TRACKER)
        self.probe = probe
        self.store = Path(store)
        self.every_n_steps = every_n_steps
        self.period: Period = period
        self.projector = projector
        self.layers = layers
        self.preconditioner = preconditioner
        self.mode = mode
        self.sample_ids = sample_ids
        self.reduction = reduction
        self.batch_dims = dict(batch_dims or {})
        self.existing = existing
        self._ledger = SampleLedger(sample_ids)
        self._tracked: TrackedTraining | None = None
        self._is_attached = self._has_failed = False
        self._state: dict[str, Any] = {}
        self._undo: list[Callable[[], None]] = []

    @property
    def contributions(self) -> Contributions:
        """What has been found so far.

        Raises:
            ValueError: If no training has begun.
        """
        if self._tracked is None:
            raise ValueError(
                "Nothing has been followed yet; expected a training. Pass this callback to a "
                "`Trainer` and fit, or read a file with `Contributions.load`."
            )
        return self._tracked.contributions()

    @property
    def scores(self) -> Scores:
        """The contributions of the whole training so far, shape ``(n_probe, n_train)``."""
        return self.contributions.scores()

    @staticmethod
    def load(path: str | Path) -> Scores:
        """Read the scores of a training that was followed; all else with ``Contributions.load``."""
        return Contributions.load(path).scores()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Make the training loader's sampler remember what it draws."""
        if stage == "fit":
            stop = watch_loaders(
                trainer, lambda loader: self._ledger.watch(loader, lambda: trainer.training)
            )
            self._undo = [stop, self._ledger.release]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check that everything can be followed, and attach the hooks."""
        require_supported(trainer, pl_module, self.preconditioner)
        require_trackable(trainer, pl_module)
        if self.sample_ids is None:
            require_one_loader(trainer)
        state = self._begin(trainer)
        probe = Probe(read_probe(self.probe), self.reduction, self.mode)
        found = follow(self._settings(), trainer, pl_module, probe, self._ledger.train_ids)
        if state:
            found.resume(state)
        self._ledger.start_training(trainer.global_step)
        for line in found.warnings:
            rank_zero_warn(f"ContributionTracker: {line}")
        rank_zero_info(f"ContributionTracker: {found.describe_cost()}")
        found.recorder.attach()
        self._undo.append(watch_clipping(trainer, found.recorder.before_clipping))
        self._tracked, self._is_attached = found, True

    def _settings(self) -> TrackerSettings:
        return TrackerSettings(
            every_n_steps=self.every_n_steps,
            period=self.period,
            projector=self.projector,
            layers=self.layers,
            preconditioner=self.preconditioner,
            mode=self.mode,
            reduction=self.reduction,
            batch_dims=self.batch_dims,
        )

    def _begin(self, trainer: Trainer) -> dict[str, Any]:
        """Return the state to continue from; nothing, if this training begins anew."""
        state, self._state = self._state, {}
        if trainer.global_step and not state and self._tracked is not None:
            return self._tracked.state()
        if trainer.global_step and state:
            return state
        if self.store.exists() and self.existing == "refuse":
            raise FileExistsError(
                f"`{self.store}` exists already, and this training does not continue it; expected "
                "a new place. Choose another name, delete it, or pass `existing='replace'`."
            )
        self.store.absolute().parent.mkdir(parents=True, exist_ok=True)
        if trainer.global_step:
            rank_zero_warn(
                f"ContributionTracker: the {trainer.global_step:,} steps before this checkpoint "
                "were not followed; following what comes after them."
            )
        return {}

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Expect the first batch of a new pass over the data."""
        self._ledger.start_epoch()

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Name the samples of the batch, and watch its forward pass if its step is due."""
        sample_ids = self._ledger.name(batch, batch_idx)
        if self._tracked is not None:
            share = 1 / trainer.accumulate_grad_batches
            self._tracked.recorder.start_batch(trainer.global_step, sample_ids, share)

    def on_before_zero_grad(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        """Forget rows of gradients that were never used: a model may decline to take a step."""
        if self._tracked is not None:
            self._tracked.recorder.forget_gradients()

    def on_before_backward(
        self, trainer: Trainer, pl_module: LightningModule, loss: Tensor
    ) -> None:
        """Listen to the backward pass of the loss."""
        if self._tracked is not None:
            self._tracked.recorder.start_backward(loss, loss_scale_of(trainer))

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Collect the rows of the batch."""
        if self._tracked is not None:
            self._tracked.recorder.end_backward()

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        """Take the probes' gradients while the weights are still those of the step."""
        tracked = self._tracked
        if tracked is not None:
            tracked.recorder.before_step(
                trainer.global_step,
                trainer.current_epoch,
                lambda rows: tracked.probe.record(trainer, pl_module, rows),
            )

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log what the step did for the probes."""
        summary = None if self._tracked is None else self._tracked.recorder.end_batch()
        if summary is not None:
            names = ("loss", "decrease", "negative_share")
            curves = {f"{self.store.stem}/{name}": getattr(summary, name) for name in names}
            # Not `log`: Lightning would repeat the last values in the steps that are not tracked.
            for logger in trainer.loggers:
                logger.log_metrics(curves, step=summary.index)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write what has been found so far."""
        self._write()

    @property
    def state_key(self) -> str:
        """Name of this tracker in a checkpoint: trackers are told apart by their files."""
        return self._generate_state_key(store=str(self.store))

    def state_dict(self) -> dict[str, Any]:
        """Return what has been found so far, so that a resumed training goes on from there."""
        return {} if self._tracked is None else self._tracked.state()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Learn what had been found when a checkpoint was saved."""
        self._state = dict(state_dict)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write what has been found, and remove everything that was installed."""
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
        if self._tracked is not None and self._is_attached:
            self._is_attached = False
            self._tracked.recorder.detach()
            self._write()

    def _write(self) -> None:
        if self._tracked is None or self._has_failed:
            return
        try:
            self._tracked.contributions().save(self.store)
        except OSError as error:
            self._has_failed = True
            rank_zero_warn(
                f"ContributionTracker: `{self.store}` cannot be written to any more ({error}). "
                "Training goes on; `scores` of this callback has what is found."
            )
