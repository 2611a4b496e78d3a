"""StepBuilder: build steps from the events of one training; independent of Lightning.

The rows of micro-batches wait here for the optimizer step that uses their gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from jaxtyping import Int
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from tda_lightning.gradients.parameter_selection import ParameterSelection
from tda_lightning.gradients.row_recorder import RowRecorder
from tda_lightning.recording.audits import (
    MAX_LOST_SHARE,
    AuditStart,
    ConservationCheck,
    begin_audit,
    blocks_beyond,
    check_complex,
    finish_audit,
    lost_parameters,
    negligible_blocks,
)
from tda_lightning.recording.optimizer_gradients import (
    GradientScale,
    ValueClipping,
    gradients_of,
    parameters_by_size,
    second_pass_errors,
    watched_parameters,
)
from tda_lightning.recording.preconditioning import (
    GradientCoordinates,
    Gradients,
    OptimizerPreconditioner,
    can_follow_gradients,
)
from tda_lightning.recording.settings import RecordingSettings
from tda_lightning.recording.taken_step import (
    BatchVisits,
    StepLabel,
    TakenStep,
)
from tda_lightning.recording.trained_layers import HyperparameterReader
from tda_lightning.stores.step import Preconditioner

# Every batch of every step has a different seed for its sampled labels.
_SEEDS_PER_STEP = 4096
# These recorded steps are checked thoroughly: something may begin to change gradients later.
_SPOT_CHECKS = frozenset({0, *(4**power for power in range(1, 20))})


class StepBuilder:
    """Turns batches and optimizer steps into :class:`TakenStep`.

    Args:
        rows: Records the rows of a batch.
        selection: All recorded blocks, with the parameters that this optimizer trains.
        preconditioner: The optimizer's preconditioner, or ``None`` for raw rows.
        settings: Settings that all optimizers share.
        label_weight: Returns the weight of the next step's sampled labels.
    """

    def __init__(
        self,
        rows: RowRecorder,
        selection: ParameterSelection,
        preconditioner: OptimizerPreconditioner | None,
        settings: RecordingSettings,
        label_weight: Callable[[], float],
    ) -> None:
        self._rows = rows
        self._selection = selection
        self._leave_out = settings.leave_out
        self._label_weight = label_weight
        self._lost = set(rows.excluded)
        self.reduction = settings.reduction
        self._preconditioner = preconditioner
        self._hyperparameters = HyperparameterReader(selection, preconditioner)
        # The preconditioner that begins with the next step, until a step holds it.
        self._new_preconditioner: Preconditioner | None = None
        # Whether the current backward pass brings them about.
        self._are_coordinates_new = False
        self._audit_every = settings.audit
        self._distributed = settings.distributed
        self.n_recorded_steps = 0
        self._check = ConservationCheck(settings.warn)
        self._current_batch: tuple[Int[Tensor, " n"], float] | None = None
        self._share = self._loss_scale = 1.0
        self._pending: list[BatchVisits] = []
        self._facts: StepLabel | None = None
        self._scale: GradientScale | None = None
        self._audit_start: AuditStart | None = None
        self._parameters_by_size: list[Parameter] = []
        self.has_several_factors = False  # Gradients of parameters, by which they are scaled.

    def start_batch(self, index: int, sample_ids: Int[Tensor, " n"], share: float) -> None:
        """Prepare for the forward pass of a batch, after ``index`` optimizer steps.

        Under accumulation, its loss is a ``share`` of the step's loss.
        """
        self._rows.start(len(sample_ids))
        self._prepare_for_loss(index, sample_ids, share)

    def _prepare_for_loss(self, index: int, sample_ids: Int[Tensor, " n"], share: float) -> None:
        self._share = share
        self._current_batch = (sample_ids, share)
        if not self._pending and self._is_check_due():
            self._rows.sum_blocks()
        batch = _SEEDS_PER_STEP * index + len(self._pending)
        self._rows.seed(batch * self._distributed.count + self._distributed.rank)

    def reorder(self, order: Int[Tensor, " n"]) -> None:
        """Give the rows of the current batch the ids of other samples of it."""
        if self._current_batch is not None:
            sample_ids, share = self._current_batch
            self._current_batch = (sample_ids[order], share)

    def start_backward(self, loss: Tensor, loss_scale: float = 1.0) -> None:
        """Prepare for the backward pass of that batch's loss, which contains ``loss_scale``."""
        if self._current_batch is not None:
            self._loss_scale = loss_scale
            self._rows.label_weight = self._label_weight()
            coordinates = self._new_coordinates(loss)
            with second_pass_errors():
                self._rows.start_backward(loss, coordinates)

    def _new_coordinates(self, loss: Tensor) -> GradientCoordinates | None:
        """Begin new coordinates if they are due, or return those that follow from this pass."""
        preconditioner = self._preconditioner  # All batches of a step share its coordinates.
        if preconditioner is None or self._pending or not preconditioner.is_due():
            return None
        gradients: Gradients = {}
        if preconditioner.needs_gradients():
            trained = [p for p in preconditioner.parameters if p.requires_grad]
            if not trained:  # This pass is for another optimizer, which the user has toggled.
                return None
            # Other processes contribute to the gradient after this pass, and sampled labels are
            # recorded before it.
            is_alone = self._distributed.count == 1 and not self._rows.samples_labels
            if is_alone and can_follow_gradients(preconditioner):
                self._are_coordinates_new = True
                return GradientCoordinates(preconditioner, self._share * self._loss_scale)
            gradients = gradients_of(loss / self._share, trained, self._rows)
            if (scale := self._loss_scale) != 1 or self._distributed.count > 1:
                gradients = {p: self._distributed.mean(g) / scale for p, g in gradients.items()}
        self._new_preconditioner = preconditioner.read(gradients)
        self._rows.precondition(self._new_preconditioner)
        return None

    def end_backward(self) -> None:
        """Collect the rows of that batch for the step that will use its gradient."""
        if self._current_batch is not None:
            self._pending.append(self._visits_of(*self._current_batch))
            self._current_batch = None

    def _visits_of(self, sample_ids: Int[Tensor, " n"], share: float) -> BatchVisits:
        weight = share / len(sample_ids) if self.reduction == "mean" else share
        rows = self._rows.end_backward()
        if self._are_coordinates_new:
            self._new_preconditioner, self._are_coordinates_new = self._rows.preconditioner, False
        return BatchVisits(sample_ids, weight * self._loss_scale, self._applied(), rows)

    def _applied(self) -> float:
        return 1 / (self._loss_scale * self._distributed.count)

    def before_step(self, index: int, epoch: int, optimizer: Optimizer) -> None:
        """Read the hyper-parameters of a step; its gradient is complete and not yet clipped."""
        if not self._pending:
            return
        self._watch_gradients(optimizer)
        self._facts = StepLabel(
            index=index,
            epoch=epoch,
            optimizer=type(optimizer).__name__,
            groups=self._hyperparameters.read(optimizer),
        )

    def before_clipping(self, optimizer: Optimizer, bound: float) -> ValueClipping | None:
        """Account for clipping by value; return its effect, ``None`` in a step not recorded."""
        if self._scale is None:
            return None
        return self._scale.before_value_clipping(self._rows.recorded_parameters(), bound)

    def forget_parameters(self) -> None:
        """Read the optimizer's parameters anew: some were frozen or unfrozen."""
        self._parameters_by_size = []

    def _watch_gradients(self, optimizer: Optimizer) -> None:
        """Start to measure the scaling of this step's gradients, and its audit if that is due."""
        if self._scale is None:
            self._parameters_by_size = self._parameters_by_size or parameters_by_size(optimizer)
            self._scale = GradientScale(*self._probe())
            self._describe_lost()
            self._audit_start = self._begin_audit() if self._is_check_due() else None

    def _describe_lost(self) -> None:
        """Name the parameters that turned out not to be recordable in this step."""
        new = {n: reason for n, reason in self._rows.lost.items() if n not in self._lost}
        if new:
            self._lost.update(new)
            limit = 1.0 if self._check.is_accepted else MAX_LOST_SHARE
            self._leave_out(lost_parameters(self._selection, new, self._parameters_by_size, limit))

    def before_update(self) -> None:
        """Measure the scaling of the gradients, before the optimizer may change them itself."""
        if self._scale is not None:
            self._scale.settle()

    def after_step(self) -> TakenStep | None:
        """Return the step that was taken since the last call, or ``None`` if none was recorded."""
        if self._facts is None or self._scale is None:
            return None
        label, batches, scale, start = self._facts, self._pending, self._scale, self._audit_start
        audit = finish_audit(self._rows, start) if start and self._is_audit_due() else None
        preconditioner, self._new_preconditioner = self._new_preconditioner, None
        self._discard_step()
        self.n_recorded_steps += 1
        return TakenStep(label, batches, scale, audit, preconditioner)

    def _is_audit_due(self) -> bool:
        steps, every = self.n_recorded_steps, self._audit_every
        return steps == 0 or bool(every and steps % every == 0)

    def _is_check_due(self) -> bool:
        """Return whether the sum of this step's rows is compared with its gradient."""
        # Only in audits do all processes add up their sums.
        is_alone = self._distributed.count == 1
        return self._is_audit_due() or (is_alone and self._is_spot_check())

    def _probe(self) -> tuple[list[Parameter], Tensor]:
        """Return parameters that show the scaling of gradients, and their norms before it."""
        return watched_parameters(self._parameters_by_size, self._watches_all())

    def _watches_all(self) -> bool:
        return self.has_several_factors or self._is_spot_check()

    def _is_spot_check(self) -> bool:
        return self.n_recorded_steps in _SPOT_CHECKS

    def _block_sums(self) -> Tensor:
        return self._rows.block_sums()

    def _begin_audit(self) -> AuditStart:
        assert self._scale is not None
        applied = self._applied() * self._scale.factor()
        sums = self._distributed.add(self._block_sums() * applied)
        start = begin_audit(self._rows, sums[:, :-1], self._parameters_by_size)
        if self.n_recorded_steps == 0:
            check_complex(self._selection, self._parameters_by_size)
        if self._is_spot_check():
            selection, number = self._selection, self.n_recorded_steps
            skipped = negligible_blocks(selection.parameters) | self._lost
            skipped |= blocks_beyond(selection, self._parameters_by_size)
            self._check(selection.blocks, start, sums[:, -1], skipped, number)
            self._check.check_lost(selection, self._lost, self._parameters_by_size, number)
        return start

    def forget_gradients(self) -> None:
        """Discard the batches whose gradients are zeroed before a step has used them."""
        if self._pending:
            self._discard_step()
            if self._is_check_due():
                self._rows.sum_blocks()

    def state(self) -> dict[str, Any]:
        """Return the state for a checkpoint, in builtins."""
        # One that no stored step holds yet would be lost: read it again instead.
        is_stored = self._preconditioner is not None and self._new_preconditioner is None
        return self._preconditioner.state() if self._preconditioner and is_stored else {}

    def resume(self, state: Mapping[str, Any], preconditioner: Preconditioner | None) -> None:
        """Continue from the :meth:`state` in a checkpoint and the last step's coordinates."""
        if self._preconditioner is not None and state and preconditioner is not None:
            self._preconditioner.load_state(state)
            self._rows.precondition(preconditioner)

    def accept(self) -> None:
        """Warn of what would be refused in a new run, since this run was accepted earlier."""
        self._check.is_accepted = True

    def drop_batch(self) -> None:
        """Discard a batch without a backward pass, and a step that was not taken."""
        if self._current_batch is not None:
            self._rows.end_backward()
            self._current_batch, self._are_coordinates_new = None, False
        if self._facts is not None:
            self._discard_step()

    def _discard_step(self) -> None:
        self._facts = self._scale = self._audit_start = None
        self._pending = []
