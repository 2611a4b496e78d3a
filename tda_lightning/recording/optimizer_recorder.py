"""Lane: the steps of one optimizer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

from torch.optim import Optimizer

from tda_lightning.gradients.layers import LayerSelection
from tda_lightning.gradients.row_recorder import RowRecorder
from tda_lightning.recording.distributed import DistributedContext
from tda_lightning.recording.manual_step_builder import ManualStepBuilder
from tda_lightning.recording.optimizer_layers import parameters_of
from tda_lightning.recording.preconditioning import JointPreconditioner, PartialPreconditioner
from tda_lightning.recording.step_builder import StepBuilder

# A gradient that is clipped by value and keeps this cosine with what it was is as good as scaled.
_STRAIGHT = 0.99


@dataclass(frozen=True)
class RecordingSettings:
    """What all lanes have in common.

    Attributes:
        optimization: Who takes the steps: Lightning, or the user.
        rows: Makes what records the rows of some layers.
        reduction: How the training loss combines the samples of a batch.
        preconditioner: Whose coordinates rows are in.
        audit: Audit every so many recorded steps of each optimizer.
        processes: Who else records this training.
        warn: Called with the text of a warning.
    """

    optimization: Literal["automatic", "manual"]
    rows: Callable[[LayerSelection, Literal["one", "several"]], RowRecorder]
    reduction: Literal["mean", "sum"]
    preconditioner: Literal["optimizer", "none"]
    audit: int
    distributed: DistributedContext
    warn: Callable[[str], None]


class OptimizerRecorder:
    """The steps of one optimizer.

    Args:
        optimizer: The optimizer.
        selection: All recorded layers, with those that feed this lane.
        settings: What all lanes have in common.
        whole: Where the coordinates of all lanes come together.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        selection: LayerSelection,
        settings: RecordingSettings,
        whole: JointPreconditioner,
    ) -> None:
        self.optimizer = optimizer
        self._warn = settings.warn
        self.taken = 0
        self._trained = self._count_trained()
        self._has_warned_of_bend = False
        self.every_n_steps = 1
        preconditioner = None
        if settings.preconditioner == "optimizer":
            preconditioner = PartialPreconditioner(optimizer, selection, whole)
        is_manual = settings.optimization == "manual"
        self.rows = settings.rows(selection, "several" if is_manual else "one")
        builder = partial(ManualStepBuilder, optimizer, self.is_due) if is_manual else StepBuilder
        self.builder = builder(
            self.rows,
            selection,
            settings.reduction,
            preconditioner,
            settings.audit,
            settings.distributed,
        )

    def is_due(self) -> bool:
        """Say whether the next step is to be recorded."""
        return self.taken % self.every_n_steps == 0

    def warn_of_more(self) -> None:
        """Say once if parameters have come to be trained since recording began."""
        more, self._trained = self._count_trained() - self._trained, self._count_trained()
        if more > 0:
            self._warn(
                f"GradientRecorder: {more} parameters of the {type(self.optimizer).__name__} are "
                "not recorded, since they were not trained when recording began."
            )

    def before_clipping(self, index: int, bound: float) -> None:
        """Follow a clipping by value, and say once if it does more than to scale a gradient."""
        bend = self.builder.before_clipping(self.optimizer, bound)
        # Not a number where gradients have overflowed: a step that is going to be skipped.
        if bend is None or not bend.cosine < _STRAIGHT or self._has_warned_of_bend:
            return
        self._has_warned_of_bend = True
        self._warn(
            f"tda_lightning: clipping by value has bent the gradient of the "
            f"{type(self.optimizer).__name__} in step {index:,} (cosine {bend.cosine:.2f}), which "
            "no factor does that its samples have in common. Rows of such steps are as before "
            f"clipping, times the factor that comes nearest (here {bend.factor:.2g}). For exact "
            "ones, set `gradient_clip_algorithm='norm'`."
        )

    def _count_trained(self) -> int:
        return sum(one.requires_grad for one in parameters_of(self.optimizer))
