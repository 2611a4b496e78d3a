"""ContributionTracker: the Lightning callback that tracks contributions to a probe set, live."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pytorch_lightning.utilities import rank_zero_warn
from torch.optim import Optimizer

from tda_lightning.callbacks.arguments import TRACKER, require_sensible
from tda_lightning.callbacks.base_callbacks import RecordingCallback
from tda_lightning.callbacks.checks import require_one_loader, require_supported
from tda_lightning.callbacks.lightning_trainer import LightningModule, Trainer
from tda_lightning.callbacks.messages import inform
from tda_lightning.callbacks.tracking.probe import Probe, read_probe
from tda_lightning.callbacks.tracking.tracked_training import (
    TrackedTraining,
    TrackerSettings,
    require_trackable,
    track,
)
from tda_lightning.gradients.sketching.projectors import Projector
from tda_lightning.passes.model_state import Mode
from tda_lightning.recording.contribution_recorder import Period
from tda_lightning.recording.sample_ids import IdSource
from tda_lightning.results.contributions import Contributions
from tda_lightning.results.scores import Scores
from tda_lightning.stores.arguments import absolute_path


class ContributionTracker(RecordingCallback):
    r"""Track, live, how much every training sample lowers the loss of each probe.

    In every tracked step, before the optimizer moves, the gradients of the probes are computed at
    the current weights. Each sample of the step is credited with

    .. math:: \eta_t \, \langle \nabla \ell_q(\theta_t), \, g_i^{(t)} \rangle

    (first-order in-run data Shapley, Wang et al. 2024). Here :math:`g_i^{(t)}` is the sample's
    contribution to the gradient as the optimizer used it. Under Adam-like optimizers, the inner
    product is taken in the optimizer's coordinates
    (:mod:`tda_lightning.recording.preconditioning`). Momentum is credited to the
    step whose gradient it carries on. The training is unchanged.

    Args:
        probe: A batch as the training loader yields it, or a ``DataLoader`` of such batches in a
            fixed order. It is read once.
        store: File to save the contributions to (``.npz``), written at the end of every epoch.
            The logged curves bear its name: ``<name>/loss``, ``<name>/decrease`` (of the probes'
            mean loss by the step) and ``<name>/negative_share`` (of the contributions).
        every_n_steps: Track every n-th optimizer step, which then stands for n steps.
        period: The period over which contributions are summed: an epoch, the whole run, or a number
            of steps.
        projector: Sketches the gradients before they are compared. By default gradients are
            compared in full, so that products are exact, if the rows of a step have at most ten
            million numbers; otherwise by :class:`~tda_lightning.KroneckerCountSketch`, with a
            warning.
        layers: Names of the modules to track, with ``*`` for any characters. By default all modules
            that are trained and supported.
        preconditioner: Whether to compare in the coordinates of an adaptive optimizer.
        mode: Whether the model is in evaluation or training mode for the probes.
        sample_ids: A key of the batch, or a function of the batch, that gives each sample's id. By
            default ids are indices into the dataset, inferred from the sampler.
        reduction: How the training loss combines its samples.
        batch_dims: Axis of the samples in layers whose names match a pattern, if it is not the
            first.
        existing: What to do if ``store`` exists and this training does not continue it.

    Raises:
        ValueError: If an argument is invalid; or before the first batch, if something cannot be
            tracked faithfully.
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
        super().__init__(sample_ids)
        self.probe = probe
        self.store = absolute_path(store)
        self._name = str(store)
        self.every_n_steps = every_n_steps
        self.period: Period = period
        self.projector = projector
        self.layers = layers
        self.preconditioner = preconditioner
        self.mode = mode
        self.reduction = reduction
        self.batch_dims = dict(batch_dims or {})
        self.existing = existing
        self._tracked: TrackedTraining | None = None
        self._has_failed = False
        self._checkpoint: dict[str, Any] = {}

    @property
    def contributions(self) -> Contributions:
        """The contributions so far.

        Raises:
            ValueError: If no training has begun.
        """
        if self._tracked is None:
            raise ValueError(
                "Nothing has been tracked yet; expected a training. Pass this callback to a "
                "`Trainer` and fit, or read a file with `Contributions.load`."
            )
        return self._tracked.contributions()

    @property
    def scores(self) -> Scores:
        """The contributions of the whole training so far, shape ``(n_probe, n_train)``."""
        return self.contributions.scores()

    @staticmethod
    def load(path: str | Path) -> Scores:
        """Read the scores of a tracked training; ``Contributions.load`` reads everything."""
        return Contributions.load(path).scores()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check that everything can be tracked, and attach the hooks."""
        require_supported(trainer, pl_module, self.preconditioner)
        require_trackable(trainer, pl_module)
        if self.sample_ids is None:
            require_one_loader(trainer)
        state = self._begin(trainer)
        probe = Probe(read_probe(self.probe), self.reduction, self.mode)
        tracked = track(self._settings(), trainer, pl_module, probe, self._ledger.train_ids)
        if state:
            tracked.resume(state)
        self._ledger.start_training(trainer.global_step)
        for line in tracked.warnings:
            rank_zero_warn(f"ContributionTracker: {line}")
        inform(f"ContributionTracker: {tracked.describe_cost()}")
        self._attach(trainer, tracked.recorder, self.every_n_steps)
        self._tracked = tracked

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
        """Return the state to continue from; an empty one if this training starts afresh."""
        state, self._checkpoint = self._checkpoint, {}
        if trainer.global_step and not state and self._tracked is not None:
            return self._tracked.state()
        if trainer.global_step and state:
            return state
        if self.store.exists() and self.existing == "refuse":
            raise FileExistsError(
                f"`{self.store}` exists already, and this training does not continue it; expected "
                "a new file. Choose another name, delete it, or pass `existing='replace'`."
            )
        self.store.parent.mkdir(parents=True, exist_ok=True)
        if trainer.global_step:
            rank_zero_warn(
                f"ContributionTracker: the {trainer.global_step:,} steps before this checkpoint "
                "were not tracked; tracking only the steps after it."
            )
        return {}

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        """Compute the gradients of the probes while the weights are still those of the step."""
        tracked = self._tracked
        if self._recorder is not None and tracked is not None:
            tracked.recorder.before_tracked_step(
                trainer.global_step,
                trainer.current_epoch,
                lambda rows: tracked.probe.record(trainer, pl_module, rows),
            )

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log the effect of the step on the probes."""
        if self._recorder is None or self._tracked is None:
            return
        summary = self._tracked.recorder.end_tracked_batch()
        if summary is not None:
            names = ("loss", "decrease", "negative_share")
            curves = {f"{self.store.stem}/{name}": getattr(summary, name) for name in names}
            # Not `log`: Lightning would repeat the last values in steps that are not tracked.
            for logger in trainer.loggers:
                logger.log_metrics(curves, step=summary.index)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the contributions so far."""
        self._save()

    @property
    def state_key(self) -> str:
        """Name of this tracker in a checkpoint; trackers are distinguished by their files."""
        return self._generate_state_key(store=self._name)

    def state_dict(self) -> dict[str, Any]:
        """Return the contributions so far, for a training that resumes from the checkpoint."""
        return {} if self._tracked is None else self._tracked.state()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Read the contributions up to a checkpoint, which are continued when training starts."""
        self._checkpoint = dict(state_dict)

    def _save(self) -> None:
        if self._tracked is None or self._has_failed:
            return
        try:
            self._tracked.contributions().save(self.store)
        except OSError as error:
            self._has_failed = True
            rank_zero_warn(
                f"ContributionTracker: `{self.store}` cannot be written any more ({error}). "
                "Training goes on; the `scores` of this callback stay available."
            )
