"""ManualStepBuilder: the steps of one optimizer, taken by the user in any order.

Rows are kept by what happened to the gradients they are part of. A backward pass that left the
gradients of this optimizer as they were is none of its business; once gradients have been zeroed,
so have the rows. What a step used is then what stands in ``.grad``, whoever put it there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from tda_lightning.gradients.layers import LayerSelection
from tda_lightning.gradients.row_recorder import RowRecorder
from tda_lightning.recording.clipping import ValueClipping, norm_after
from tda_lightning.recording.distributed import DistributedContext
from tda_lightning.recording.optimizer_gradients import (
    by_size,
    gradient_norm,
    smallest_with_gradient,
)
from tda_lightning.recording.preconditioning import PartialPreconditioner
from tda_lightning.recording.step_builder import StepBuilder
from tda_lightning.stores.step import Step

# A gradient tensor, by identity, and how often it has been written to.
_Mark = tuple[int, int] | None
# Two gradients that are clipped by a common norm change by the same factor, to rounding.
_TOLERANCE = 1e-2


class ManualStepBuilder(StepBuilder):
    """Turns the backward passes and steps of one optimizer into :class:`Step`.

    Args:
        optimizer: The optimizer.
        is_due: Says whether its next step is to be recorded.
        rows: Records the rows of a pass.
        selection: All recorded layers, with those that the optimizer trains.
        reduction: How a loss combines the samples of a batch.
        preconditioner: The coordinates of the optimizer, unless rows are to be raw.
        audit_every: As in :class:`StepBuilder`.
        processes: Who else records this training.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        is_due: Callable[[], bool],
        rows: RowRecorder,
        selection: LayerSelection,
        reduction: Literal["mean", "sum"],
        preconditioner: PartialPreconditioner | None,
        audit_every: int,
        distributed: DistributedContext,
    ) -> None:
        super().__init__(rows, selection, reduction, preconditioner, audit_every, distributed)
        self._parameters = by_size(optimizer)
        self._is_due = is_due
        self._batch: tuple[int, Int[Tensor, " n"]] | None = None
        self._marks: list[_Mark] = []
        self._references: list[tuple[Parameter, Tensor]] = []
        self._sums: Tensor | None = None
        # Whether `.grad` still holds the gradient of a step that was taken, and has been added to.
        self._is_used = self._is_mixed = False

    def start_batch(self, index: int, sample_ids: Int[Tensor, " n"], share: float) -> None:
        """Expect forward and backward passes over a batch."""
        self._batch = (index, sample_ids)
        super().start_batch(index, sample_ids, share)

    def start_backward(self, loss: Tensor, loss_scale: float = 1.0) -> None:
        """Expect a backward pass, of any loss."""
        self._forget_zeroed()
        self._marks = _marks(self._parameters)
        if self._current is None or not self._is_due():
            return
        if self._is_audit_due():
            self._rows.sum_blocks()
        super().start_backward(loss, loss_scale)

    def end_backward(self) -> None:
        """Keep the rows of that pass, if it has added to the gradients of this optimizer."""
        if self._current is None or self._batch is None or not self._is_due():
            return
        sums = self._rows.block_sums() if self._is_audit_due() else None
        visits = self._visits_of(*self._current)
        marks, self._marks = self._marks, _marks(self._parameters)
        if self._marks != marks:
            if self._scale is not None:
                raise ValueError(
                    "Gradients were clipped by value before the last backward pass of their step, "
                    "which has added to what was left of them; expected all passes before. Clip "
                    "right before the step."
                )
            self._pending.append(visits)
            self._is_mixed = self._is_mixed or self._is_used
            self._references = _references(self._parameters)
            self._sums = sums if self._sums is None or sums is None else self._sums + sums
        self._rows.go_on()  # More passes may come.
        self._expect_loss(*self._batch, self._share)

    def forget_gradients(self) -> None:
        """Do nothing: gradients are looked at before every pass."""

    def before_step(self, index: int, epoch: int, optimizer: Optimizer) -> None:
        """Read what the optimizer is about to use.

        Raises:
            ValueError: If what it is about to use is not what was recorded.
        """
        if not self._is_due():
            return
        name = type(optimizer).__name__
        if not self._pending and smallest_with_gradient(self._parameters) is not None:
            raise ValueError(
                f"The {name} takes a step with gradients of a backward pass that Lightning has not "
                "seen; expected `self.manual_backward(loss)`. Call it instead of `loss.backward()`."
            )
        if self._is_mixed:
            raise ValueError(
                f"The gradients of the {name} were not zeroed between two of its steps, so that "
                "the second step takes the first one's samples along; expected `zero_grad()` "
                "before the backward pass of every step. Call it."
            )
        self._require_common_factor(name)
        super().before_step(index, epoch, optimizer)

    def before_clipping(self, optimizer: Optimizer, bound: float) -> ValueClipping | None:
        """Follow what clipping by value is about to do to the gradients of a step.

        Raises:
            ValueError: If they are not what was recorded any more.
        """
        if not self._pending or not self._is_due():
            return None
        self._require_common_factor(type(optimizer).__name__)
        self._watch_gradients(optimizer)
        bend = super().before_clipping(optimizer, bound)
        self._references = [(one, norm_after(one, bound)) for one, _ in self._references]
        return bend

    def after_step(self) -> Step | None:
        """Return the step that was taken, or ``None`` if it was not recorded."""
        if self._facts is None and self._pending:
            raise ValueError(
                "There was a step of an optimizer that Lightning has not seen, so that no rate and "
                "no number is known of it; expected the optimizers that `self.optimizers()` "
                "returns. Take steps with those."
            )
        step = super().after_step()
        self._is_used = step is not None
        self._sums = None
        return step

    def _probe(self) -> tuple[Parameter | None, Tensor | None]:
        if not self._references:
            return None, None
        probe, norm = self._references[0]
        return probe, norm / self._loss_scale

    def _block_sums(self) -> Float[Tensor, "blocks k"]:
        assert self._sums is not None
        return self._sums

    def _forget_zeroed(self) -> None:
        """Drop what is waiting if the gradients it is part of have been zeroed."""
        if not (self._pending or self._is_used) or not self._are_zeroed():
            return
        self._forget_step()
        self._sums = None
        self._is_used = self._is_mixed = False

    def _are_zeroed(self) -> bool:
        if all(one.grad is None for one in self._parameters):
            return True
        if _marks(self._parameters) == self._marks:
            return False
        return smallest_with_gradient(self._parameters) is None

    def _require_common_factor(self, name: str) -> None:
        if not self._pending or _marks(self._parameters) == self._marks:
            return
        factors = [gradient_norm(one) / norm for one, norm in self._references]
        spread = float(max(factors) / min(factors) - 1) if factors else 0.0
        if spread > _TOLERANCE:
            raise ValueError(
                f"The gradients of the {name} were changed between the backward pass and the step, "
                "and not all by one factor; expected them as they were, or clipped. Clip with "
                "`self.clip_gradients`."
            )


def _marks(parameters: Sequence[Parameter]) -> list[_Mark]:
    return [None if p.grad is None else (id(p.grad), p.grad._version) for p in parameters]


def _references(parameters: Sequence[Parameter]) -> list[tuple[Parameter, Tensor]]:
    """Return the parameters that have a gradient other than zero, with its norm."""
    norms = [(one, gradient_norm(one)) for one in parameters if one.grad is not None]
    return [(one, norm) for one, norm in norms if norm > 0]
