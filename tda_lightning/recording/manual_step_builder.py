"""ManualStepBuilder: build the steps of one optimizer under manual optimization, in any order.

The rows that wait for a step follow the gradients of this optimizer. Backward passes that leave
its gradients unchanged are ignored. Zeroing its gradients also discards the waiting rows. A step
uses the contents of ``.grad``, whichever backward passes added to them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from tda_lightning.gradients.parameter_selection import ParameterSelection
from tda_lightning.gradients.row_recorder import RowRecorder
from tda_lightning.recording.optimizer_gradients import (
    MAX_FACTOR_SPREAD,
    ValueClipping,
    clipped_norm,
    first_with_gradient,
    gradient_norm,
    gradient_norms,
    parameters_by_size,
)
from tda_lightning.recording.preconditioning import OptimizerPreconditioner
from tda_lightning.recording.settings import RecordingSettings
from tda_lightning.recording.step_builder import StepBuilder
from tda_lightning.recording.taken_step import TakenStep

# The identity of a gradient tensor, and the number of in-place changes to it.
_GradientVersion = tuple[int, int] | None


class ManualStepBuilder(StepBuilder):
    """Turns the backward passes and steps of one optimizer into :class:`TakenStep`.

    ``is_due`` returns whether its next step is to be recorded. The other arguments are those of
    :class:`StepBuilder`.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        is_due: Callable[[], bool],
        rows: RowRecorder,
        selection: ParameterSelection,
        preconditioner: OptimizerPreconditioner | None,
        settings: RecordingSettings,
        label_weight: Callable[[], float],
    ) -> None:
        super().__init__(rows, selection, preconditioner, settings, label_weight)
        self._parameters = parameters_by_size(optimizer)
        self._is_due = is_due
        self._batch: tuple[int, Int[Tensor, " n"]] | None = None
        self._versions: list[_GradientVersion] = []
        self._reference_norms: list[tuple[Parameter, Tensor]] = []
        self._sums: Tensor | None = None
        # Whether `.grad` still holds the gradient of an earlier step, and has been added to since.
        self._is_used = self._is_mixed = False

    def start_batch(self, index: int, sample_ids: Int[Tensor, " n"], share: float) -> None:
        """Prepare for the forward and backward passes of a batch."""
        self._batch = (index, sample_ids)
        super().start_batch(index, sample_ids, share)

    def reorder(self, order: Int[Tensor, " n"]) -> None:
        """Give the rows of all passes of the current batch the ids of other samples of it."""
        super().reorder(order)
        if self._batch is not None:
            index, sample_ids = self._batch
            self._batch = (index, sample_ids[order])

    def start_backward(self, loss: Tensor, loss_scale: float = 1.0) -> None:
        """Prepare for the backward pass of any loss."""
        self._discard_zeroed()
        self._versions = _gradient_versions(self._parameters)
        if self._current_batch is None or not self._is_due():
            return
        if self._is_check_due():
            self._rows.sum_blocks()
        super().start_backward(loss, loss_scale)

    def end_backward(self) -> None:
        """Collect the rows of that pass, if it has added to the gradients of this optimizer."""
        if self._current_batch is None or self._batch is None or not self._is_due():
            return
        sums = self._rows.block_sums() if self._is_check_due() else None
        visits = self._visits_of(*self._current_batch)
        before, self._versions = self._versions, _gradient_versions(self._parameters)
        if self._versions != before:
            if self._scale is not None:
                raise ValueError(
                    "Gradients were clipped by value before the last backward pass of their step, "
                    "which then added to the clipped gradients; expected all backward passes "
                    "before clipping. Clip right before the step."
                )
            self._pending.append(visits)
            self._is_mixed = self._is_mixed or self._is_used
            self._reference_norms = _nonzero_norms(self._parameters)
            self._sums = sums if self._sums is None or sums is None else self._sums + sums
        self._rows.continue_batch()  # More passes may come.
        self._prepare_for_loss(*self._batch, self._share)

    def forget_gradients(self) -> None:
        """Do nothing: zeroed gradients are detected before every backward pass."""

    def before_step(self, index: int, epoch: int, optimizer: Optimizer) -> None:
        """Read the hyper-parameters that the optimizer is about to use.

        Raises:
            ValueError: If the gradients that it is about to use are not the recorded ones.
        """
        if not self._is_due():
            return
        name = type(optimizer).__name__
        if not self._pending and first_with_gradient(self._parameters) is not None:
            raise ValueError(
                f"The {name} takes a step with gradients of a backward pass that Lightning has not "
                "seen; expected `self.manual_backward(loss)`. Call it instead of `loss.backward()`."
            )
        if self._is_mixed:
            raise ValueError(
                f"The gradients of the {name} were not zeroed between two of its steps, so the "
                "second step also uses the samples of the first; expected `zero_grad()` before the "
                "backward pass of every step. Call it."
            )
        self._require_common_factor(name)
        super().before_step(index, epoch, optimizer)

    def before_clipping(self, optimizer: Optimizer, bound: float) -> ValueClipping | None:
        """Account for clipping by value that is about to change the gradients of a step.

        Raises:
            ValueError: If the gradients are no longer the recorded ones.
        """
        if not self._pending or not self._is_due():
            return None
        self._require_common_factor(type(optimizer).__name__)
        self._watch_gradients(optimizer)
        clipping = super().before_clipping(optimizer, bound)
        self._reference_norms = [(p, clipped_norm(p, bound)) for p, _ in self._reference_norms]
        return clipping

    def after_step(self) -> TakenStep | None:
        """Return the step that was taken, or ``None`` if it was not recorded."""
        if self._facts is None and self._pending:
            raise ValueError(
                "An optimizer took a step that Lightning has not seen, so the learning rate and "
                "the index of the step are unknown; expected the optimizers that "
                "`self.optimizers()` returns. Take steps with those."
            )
        step = super().after_step()
        self._is_used = step is not None
        self._sums = None
        return step

    def _probe(self) -> tuple[list[Parameter], Tensor]:
        reference = self._reference_norms if self._watches_all() else self._reference_norms[:1]
        norms = [norm / self._loss_scale for _, norm in reference]
        return [p for p, _ in reference], torch.stack(norms) if norms else gradient_norms([])

    def _block_sums(self) -> Float[Tensor, "blocks k1"]:
        assert self._sums is not None
        return self._sums

    def _discard_zeroed(self) -> None:
        """Discard the waiting rows if the gradients that they are part of have been zeroed."""
        if not (self._pending or self._is_used) or not self._are_zeroed():
            return
        self._discard_step()
        self._sums = None
        self._is_used = self._is_mixed = False

    def _are_zeroed(self) -> bool:
        if all(parameter.grad is None for parameter in self._parameters):
            return True
        if _gradient_versions(self._parameters) == self._versions:
            return False
        return first_with_gradient(self._parameters) is None

    def _require_common_factor(self, name: str) -> None:
        if not self._pending or _gradient_versions(self._parameters) == self._versions:
            return
        reference = self._reference_norms
        factors = [gradient_norm(p) / norm for p, norm in reference if p.grad is not None]
        spread = float(max(factors) / min(factors) - 1) if factors else 0.0
        if spread > MAX_FACTOR_SPREAD:
            raise ValueError(
                f"The gradients of the {name} were changed between the backward pass and the step, "
                "and not all by one factor; expected unchanged or clipped gradients. Clip with "
                "`self.clip_gradients`."
            )


def _gradient_versions(parameters: Sequence[Parameter]) -> list[_GradientVersion]:
    return [None if p.grad is None else (id(p.grad), p.grad._version) for p in parameters]


def _nonzero_norms(parameters: Sequence[Parameter]) -> list[tuple[Parameter, Tensor]]:
    """Return the parameters whose gradient is not zero, with its norm."""
    norms = [(p, gradient_norm(p)) for p in parameters if p.grad is not None]
    return [(parameter, norm) for parameter, norm in norms if norm != 0]  # NaN is not zero
