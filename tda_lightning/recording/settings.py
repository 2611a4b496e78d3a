"""What the recorders of all optimizers share: their settings, and the processes that train."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor
from torch.nn import Parameter

from tda_lightning.gradients.losses import LabelSchedule
from tda_lightning.gradients.parameter_selection import ParameterSelection
from tda_lightning.gradients.row_recorder import RowRecorder
from tda_lightning.stores.recipe import LeftOut


@dataclass(frozen=True)
class DistributedContext:
    """The processes that train together; each sees its part of every batch.

    The gradient is the mean over ``count`` processes. All of them must call ``add``.
    """

    rank: int = 0
    count: int = 1
    add: Callable[[Tensor], Tensor] = lambda tensor: tensor

    def mean(self, tensor: Tensor) -> Tensor:
        """Return the mean over all processes; all of them must call it."""
        return tensor if self.count == 1 else self.add(tensor) / self.count


@dataclass(frozen=True)
class RecordingSettings:
    """Settings that the recorders of all optimizers share.

    Attributes:
        optimization: Whether Lightning or the user's ``training_step`` takes the steps.
        rows: Creates the row recorder of some parameters.
        reduction: How the training loss combines the samples of a batch.
        preconditioner: Whether rows are in the optimizer's coordinates.
        audit: Audit every n-th recorded step of each optimizer.
        distributed: The other processes of this training.
        warn: Called with the text of a warning.
        leave_out: Called with the parameters that turn out not to be recordable.
        note_unfrozen: Called with the parameters that are trained only from some later step on.
        labels: The steps at which labels are sampled, if rows for sampled labels are recorded.
    """

    optimization: Literal["automatic", "manual"]
    rows: Callable[[ParameterSelection], RowRecorder]
    reduction: Literal["mean", "sum"]
    preconditioner: Literal["optimizer", "none"]
    audit: int
    distributed: DistributedContext
    warn: Callable[[str], None]
    leave_out: Callable[[Sequence[LeftOut]], None]
    note_unfrozen: Callable[[Sequence[Parameter]], None] = lambda parameters: None
    labels: LabelSchedule | None = None
