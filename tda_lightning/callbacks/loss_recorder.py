"""LossRecorder: the Lightning callback that records losses and the order of samples, no rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Int
from torch import Tensor
from torch.optim import Optimizer

from tda_lightning.callbacks.arguments import RECORDER, require_sensible
from tda_lightning.callbacks.base_callbacks import RecordedRun, RecordingCallback
from tda_lightning.callbacks.checks import require_one_loader
from tda_lightning.callbacks.lightning_trainer import LightningModule, Trainer, sampler_pass
from tda_lightning.callbacks.run_location import Existing
from tda_lightning.callbacks.training_ids import known_ids, with_new_ids
from tda_lightning.gradients.capture.indexed_rows import stated_rows
from tda_lightning.gradients.capture.plain_batches import is_compiled
from tda_lightning.gradients.losses import DeferredSummary, LossFacts, find_losses_and_penalties
from tda_lightning.gradients.losses.regression_losses import SquarePower
from tda_lightning.recording.sample_ids import IdSource
from tda_lightning.recording.taken_step import StepsTogether, WaitingStep, common_name, joined
from tda_lightning.stores import WritableStore
from tda_lightning.stores.recipe import Recipe
from tda_lightning.stores.step import OPTIONAL_FACTS, ParameterGroup, Step

_CHECKED = ("store", "sample_ids", "reduction", "existing")


class LossRecorder(RecordedRun, RecordingCallback):
    """Record the id and the loss of every visit, without gradients.

    It costs little and needs no knowledge of the model. Read the result with
    :func:`tda_lightning.applications.loss_history`; :func:`find_mislabeled` works on it, too. The
    training is unchanged. Attribution needs :class:`GradientRecorder`.

    Args:
        store: Folder to record into, or a store; by default ``run.tda`` in ``trainer.log_dir``.
        sample_ids: A key of the batch, or a function of the batch, that gives each sample's id. By
            default ids are indices into the dataset, inferred from the sampler.
        reduction: How the training loss combines its samples.
        existing: What to do if ``store`` holds a run that this training does not continue, as in
            :class:`GradientRecorder`.

    Raises:
        ValueError: If an argument is invalid; or before the first batch, if optimization is manual.
        FileExistsError: Before the first batch, if ``store`` holds a run or something else.
    """

    _name = "LossRecorder"

    def __init__(
        self,
        store: str | Path | WritableStore | None = None,
        *,
        sample_ids: IdSource | None = None,
        reduction: Literal["mean", "sum"] = "mean",
        existing: Existing | None = None,
    ) -> None:
        require_sensible(locals(), {name: RECORDER[name] for name in _CHECKED})
        RecordedRun.__init__(self, store, existing)
        RecordingCallback.__init__(self, sample_ids)
        self.reduction = reduction
        self._is_attached = False
        self._ids: Int[Tensor, " n"] | None = None
        self._summary: DeferredSummary | None = None
        self._batches: list[_Batch] = []
        self._label: dict[str, Any] | None = None
        self._steps = StepsTogether()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin or continue the run."""
        if not pl_module.automatic_optimization:
            raise ValueError(
                "`LossRecorder` pairs each batch with the step that uses it; expected automatic "
                "optimization. Use `GradientRecorder` for manual optimization."
            )
        if self.sample_ids is None:
            require_one_loader(trainer)
        self._choose_store(trainer)
        recipe = Recipe(
            blocks=(),
            left_out=(),
            projector={"name": "none"},
            dimension=1,  # A column of zeros, since stores hold at least one.
            widths=None,
            dtype="float32",
            reduction=self.reduction,
            batch_dims={},
            preconditioner="none",
            curvature="none",
            ranks=trainer.world_size,
            every_n_steps=1,
            train_ids=known_ids(trainer, self._ledger, self._writer.continued_recipe(trainer)),
            model=type(pl_module).__name__,
            versions={name: version(name) for name in ("tda_lightning", "torch")},
        )
        self._writer.begin(trainer, recipe)
        self._ledger.start_training(trainer.global_step)
        self._is_attached = True

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Expect the first batch of a new pass, perhaps over other data than before."""
        super().on_train_epoch_start(trainer, pl_module)
        recipe = with_new_ids(trainer, self._ledger, self.store.recipe)
        if recipe is not self.store.recipe:
            self._writer.amend(recipe)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Determine the sample ids of the batch."""
        self._ids = self._ledger.name(batch, batch_idx, sampler_pass(trainer))
        if len(self._ids) > 1:
            self._drawn_samples.start(batch, len(self._ids), is_compiled(pl_module))

    def on_before_backward(
        self, trainer: Trainer, pl_module: LightningModule, loss: Tensor
    ) -> None:
        """Watch the loss function in the backward pass of the batch."""
        self._drawn_samples.stop()
        if self._ids is not None and len(self._ids):
            known = self._drawn_samples.known_rows(len(self._ids))
            order = self._drawn_samples.order(loss, rows_of=None)
            self._ids = self._ids if order is None else self._ids[order]
            nodes = find_losses_and_penalties(loss)
            # Squares beside another loss are penalties.
            losses = [node for node in nodes if not isinstance(node, SquarePower)]
            n = len(self._ids)
            # With as many joined elements as samples, the terms may be either's: they are not read.
            self._summary = DeferredSummary(
                losses or nodes,
                n,
                lambda: n in known.stated,
                lambda node: stated_rows(node, known, _Inner()),
                loss,
            )
            self._summary.is_irregular = bool(known.stated)

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Collect the summary of the loss for the step that will use the batch."""
        ids, summary = self._ids, self._summary
        self._ids = self._summary = None
        if ids is None or summary is None:
            return
        share = 1 / trainer.accumulate_grad_batches
        weight = share / len(ids) if self.reduction == "mean" else share
        self._batches.append(_Batch(ids, weight, summary))

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        """Read the learning rates now: the scheduler steps before the end of the batch."""
        self._label = {
            "index": trainer.global_step,
            "epoch": trainer.current_epoch,
            "optimizer": type(optimizer).__name__,
            "groups": tuple(ParameterGroup(lr=float(g["lr"])) for g in optimizer.param_groups),
        }

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Add the step, if it was taken, to those whose losses are computed together."""
        self._drawn_samples.stop()
        label, self._label = self._label, None
        if label is None:
            return
        batches, self._batches = self._batches, []
        if batches and trainer.global_step > label["index"]:
            self._steps.add(_TakenStep(label, batches), self._writer.append)

    def _finish_steps(self) -> dict[str, Any] | None:
        self._steps.flush()
        return {} if self._is_attached else None

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Seal the run."""
        super().on_train_end(trainer, pl_module)
        self._writer.finish(trainer)

    def _close(self) -> None:
        super()._close()
        if self._is_attached:
            self._batches, self._ids, self._summary = [], None, None
            self._finish_steps()
            self._is_attached = False  # Not before: an interrupt makes Lightning close it again.
            self._writer.close()


@dataclass(frozen=True)
class _Batch:
    """A batch of a step: its samples, the weight of each in the loss, and their losses."""

    sample_ids: Int[Tensor, " n"]
    weight: float
    summary: DeferredSummary


class _TakenStep(WaitingStep):
    """A step that was taken, with the optimizer's values at that time, as its ``label``."""

    size = 0

    def __init__(self, label: dict[str, Any], batches: Sequence[_Batch]) -> None:
        self._label, self._batches = label, batches

    @property
    def summaries(self) -> list[DeferredSummary]:
        """The summaries of the losses of its batches."""
        return [batch.summary for batch in self._batches]

    def columns(self, facts: Sequence[LossFacts]) -> dict[str, Tensor]:
        """Return the facts of its visits, given those of each batch."""
        pairs = zip(self._batches, facts, strict=True)
        return joined([facts.of_visits(batch.weight) for batch, facts in pairs])

    def finish(self, columns: Mapping[str, Tensor]) -> Step:
        """Return the step, given the facts of its visits."""
        ids = torch.cat([batch.sample_ids for batch in self._batches])
        weights = [torch.full((len(b.sample_ids),), b.weight) for b in self._batches]
        known: dict[str, Any] = {name: columns.get(name) for name in OPTIONAL_FACTS}
        return Step(
            **self._label,
            **known,
            sample_ids=ids,
            weights=torch.cat(weights),
            sketch=torch.zeros(len(ids), 1),
            loss=common_name(self.summaries),
        )


class _Inner:
    """All nodes of a graph but its leaves."""

    def __contains__(self, node: object) -> bool:
        return bool(getattr(node, "next_functions", ()))
