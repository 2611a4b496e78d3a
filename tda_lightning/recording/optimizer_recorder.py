"""Lane: the steps of one optimizer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

from torch.optim import Optimizer

from tda_lightning.gradients.layers import Survey
from tda_lightning.gradients.row_recorder import RowRecorder
from tda_lightning.recording.distributed import Processes
from tda_lightning.recording.manual_step_builder import ManualSession
from tda_lightning.recording.optimizer_layers import parameters_of
from tda_lightning.recording.preconditioning import PartOfCoordinates, WholeCoordinates
from tda_lightning.recording.step_builder import Session

# A gradient that is clipped by value and keeps this cosine with what it was is as good as scaled.
_STRAIGHT = 0.99


@dataclass(frozen=True)
class Settings:
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
    rows: Callable[[Survey, Literal["one", "several"]], RowRecorder]
    reduction: Literal["mean", "sum"]
    preconditioner: Literal["optimizer", "none"]
    audit: int
    processes: Processes
    warn: Callable[[str], None]


class Lane:
    """The steps of one optimizer.

    Args:
        optimizer: The optimizer.
        surveyed: All recorded layers, with those that feed this lane.
        settings: What all lanes have in common.
        whole: Where the coordinates of all lanes come together.
    """

    def __init__(
        self, optimizer: Optimizer, surveyed: Survey, settings: Settings, whole: WholeCoordinates
    ) -> None:
        self.optimizer = optimizer
        self._warn = settings.warn
        self.taken = 0
        self._trained = self._count_trained()
        self._has_warned_of_bend = False
        self.every_n_steps = 1
        coordinates = None
        if settings.preconditioner == "optimizer":
            coordinates = PartOfCoordinates(optimizer, surveyed, whole)
        is_manual = settings.optimization == "manual"
        self.rows = settings.rows(surveyed, "several" if is_manual else "one")
        session = partial(ManualSession, optimizer, self.is_due) if is_manual else Session
        self.session = session(
            self.rows,
            surveyed,
            settings.reduction,
            coordinates,
            settings.audit,
            settings.processes,
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
        bend = self.session.before_clipping(self.optimizer, bound)
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
