"""Session: from the events of one training to its steps, without a word of Lightning.

Micro-batches wait here until the optimizer step that they join.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from tda_lightning.gradients.layers import LayerSelection
from tda_lightning.gradients.row_recorder import BatchRows, RowRecorder
from tda_lightning.recording.audits import Audited, begin_audit, finish_audit, require_conserved
from tda_lightning.recording.clipping import GradientScale, ValueClipping
from tda_lightning.recording.distributed import DistributedContext
from tda_lightning.recording.hyperparameters import HyperparameterReader
from tda_lightning.recording.optimizer_gradients import (
    by_size,
    gradient_norm,
    gradients_of,
    joined,
    smallest_with_gradient,
)
from tda_lightning.recording.preconditioning import PartialPreconditioner
from tda_lightning.stores.step import ParameterGroup, Preconditioner, Step

# Labels are sampled from seeds of their own for every batch of every step.
_SEEDS_PER_STEP = 4096


@dataclass(frozen=True)
class Visits:
    """The visits of one batch.

    ``weight`` is that of a sample's loss in the loss that was seen, and ``applied`` what the
    optimizer used of that: not its loss scale, and the share of this process.
    """

    sample_ids: Int[Tensor, " n"]
    weight: float
    applied: float
    recorded: BatchRows


@dataclass(frozen=True)
class _Facts:
    index: int
    epoch: int
    optimizer: str
    groups: tuple[ParameterGroup, ...]


class StepBuilder:
    """Turns batches and optimizer steps into :class:`Step`.

    Args:
        rows: Records the rows of a batch.
        selection: All recorded layers, with those that the optimizer trains.
        reduction: How the training loss combines the samples of a batch.
        preconditioner: The coordinates of the optimizer, unless rows are to be raw.
        audit_every: Audit the first recorded step and every so many after it; 0 for the first only.
        processes: Who else records this training.
    """

    def __init__(
        self,
        rows: RowRecorder,
        selection: LayerSelection,
        reduction: Literal["mean", "sum"],
        preconditioner: PartialPreconditioner | None,
        audit_every: int,
        distributed: DistributedContext = DistributedContext(),
    ) -> None:
        self._rows = rows
        self._blocks = selection.blocks
        self._reduction = reduction
        self._preconditioner = preconditioner
        self._recorded = HyperparameterReader.of(selection, preconditioner)
        self._begun: Preconditioner | None = None
        self._audit_every = audit_every
        self._distributed = distributed
        self._steps = 0
        self._current: tuple[Int[Tensor, " n"], float] | None = None
        self._share = self._loss_scale = 1.0
        self._pending: list[Visits] = []
        self._facts: _Facts | None = None
        self._scale: GradientScale | None = None
        self._audited: Audited | None = None
        self._probes: list[Parameter] = []

    def start_batch(self, index: int, sample_ids: Int[Tensor, " n"], share: float) -> None:
        """Expect the forward pass of a batch.

        Args:
            index: Number of optimizer steps taken so far.
            sample_ids: Its samples.
            share: Factor of its loss in the step's loss (less than 1 under accumulation).
        """
        self._rows.start(len(sample_ids))
        self._expect_loss(index, sample_ids, share)

    def _expect_loss(self, index: int, sample_ids: Int[Tensor, " n"], share: float) -> None:
        n = len(sample_ids)
        self._share = share
        self._current = (sample_ids, share / n if self._reduction == "mean" else share)
        if not self._pending and self._is_audit_due():
            self._rows.sum_blocks()
        batch = _SEEDS_PER_STEP * index + len(self._pending)
        self._rows.seed(batch * self._distributed.count + self._distributed.rank)

    def start_backward(self, loss: Tensor, loss_scale: float = 1.0) -> None:
        """Expect the backward pass of that batch's loss.

        Args:
            loss: The loss.
            loss_scale: What it was multiplied by to keep small gradients from vanishing.
        """
        if self._current is not None:
            self._loss_scale = loss_scale
            self._follow_coordinates(loss)
            self._rows.start_backward(loss)

    def _follow_coordinates(self, loss: Tensor) -> None:
        preconditioner = self._preconditioner
        # A step has one set of coordinates: that of its first batch.
        if preconditioner is None or self._pending or not preconditioner.is_due():
            return
        gradients = {}
        if preconditioner.needs_gradients():
            trained = [one for one in preconditioner.parameters() if one.requires_grad]
            found = gradients_of(loss / self._share, trained)
            mean, scale = self._distributed.mean, self._loss_scale
            gradients = {parameter: mean(one) / scale for parameter, one in found.items()}
        self._begun = preconditioner.read(gradients)
        self._rows.precondition(self._begun)

    def end_backward(self) -> None:
        """Keep the rows of that batch for the step they will join."""
        if self._current is not None:
            self._pending.append(self._visits_of(*self._current))
            self._current = None

    def _visits_of(self, sample_ids: Int[Tensor, " n"], weight: float) -> Visits:
        seen, applied = weight * self._loss_scale, self._applied()
        return Visits(sample_ids, seen, applied, self._rows.end_backward())

    def _applied(self) -> float:
        return 1 / (self._loss_scale * self._distributed.count)

    def before_step(self, index: int, epoch: int, optimizer: Optimizer) -> None:
        """Read what the optimizer is about to use; gradients are complete and not yet clipped."""
        if not self._pending:
            return
        self._watch_gradients(optimizer)
        self._facts = _Facts(
            index=index,
            epoch=epoch,
            optimizer=type(optimizer).__name__,
            groups=self._recorded.read(optimizer),
        )

    def before_clipping(self, optimizer: Optimizer, bound: float) -> ValueClipping | None:
        """Follow what clipping by value is about to do to the gradients of a step.

        Args:
            optimizer: The optimizer that is going to take it.
            bound: Largest absolute value to be left.

        Returns:
            What it does, or ``None`` if the step is not recorded.
        """
        if self._scale is None:
            return None
        return self._scale.bend(self._rows.recorded_parameters(), bound)

    def _watch_gradients(self, optimizer: Optimizer) -> None:
        """From now on, know what becomes of the gradients of this step, and audit it if due."""
        if self._scale is None:
            self._probes = self._probes or by_size(optimizer)
            self._scale = GradientScale(*self._probe())
            self._audited = self._start_audit() if self._is_audit_due() else None

    def after_step(self) -> Step | None:
        """Return the step that was taken since the last call, or ``None`` if none was recorded."""
        if self._facts is None or self._scale is None:
            return None
        facts, visits, scaled = self._facts, self._pending, self._scale.factor()
        audit = None if self._audited is None else finish_audit(self._rows, self._audited)
        self._forget_step()
        self._steps += 1
        factors = [one.applied * scaled for one in visits]
        weights = [
            torch.full((len(one.sample_ids),), one.weight * factor)
            for one, factor in zip(visits, factors, strict=True)
        ]
        sketch = joined([one.recorded.rows for one in visits], factors)
        assert sketch is not None
        begun, self._begun = self._begun, None
        return Step(
            index=facts.index,
            epoch=facts.epoch,
            optimizer=facts.optimizer,
            groups=facts.groups,
            sample_ids=torch.cat([one.sample_ids for one in visits]),
            weights=torch.cat(weights),
            sketch=sketch,
            audit=audit,
            terms=joined([one.recorded.terms for one in visits]),
            curvature=joined([one.recorded.curvature(one.weight) for one in visits]),
            # Curvature goes with the loss, and a row is a square root of it.
            curvature_rows=joined(
                [one.recorded.curvature_rows for one in visits],
                [factor**0.5 for factor in factors],
            ),
            preconditioner=begun,
            loss=_shared([one.recorded.loss for one in visits]),
        )

    def _is_audit_due(self) -> bool:
        return self._steps == 0 or bool(self._audit_every and self._steps % self._audit_every == 0)

    def _probe(self) -> tuple[Parameter | None, Tensor | None]:
        """Return a gradient that is cheap to watch, and its norm before it is clipped."""
        probe = smallest_with_gradient(self._probes)
        return probe, None if probe is None else gradient_norm(probe)

    def _block_sums(self) -> Float[Tensor, "blocks k"]:
        return self._rows.block_sums()

    def _start_audit(self) -> Audited:
        assert self._scale is not None
        applied = self._applied() * self._scale.factor()
        recorded = self._distributed.add(self._block_sums() * applied)
        audited = begin_audit(self._rows, recorded, self._probes)
        if self._steps == 0:
            require_conserved(self._blocks, recorded, audited.gradient)
        return audited

    def forget_gradients(self) -> None:
        """Forget the batches whose gradients are zeroed before any step has used them."""
        if self._pending:
            self._forget_step()
            if self._is_audit_due():
                self._rows.sum_blocks()

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint should know of this session, in builtins."""
        # Coordinates that no stored step holds yet cannot be found again: they are read anew.
        is_stored = self._preconditioner is not None and self._begun is None
        return self._preconditioner.state() if self._preconditioner and is_stored else {}

    def resume(self, state: Mapping[str, Any], preconditioner: Preconditioner | None) -> None:
        """Go on where a checkpoint was saved.

        Args:
            state: What :meth:`state` returned then.
            preconditioner: Those of the last stored step.
        """
        if self._preconditioner is not None and state and preconditioner is not None:
            self._preconditioner.load_state(state)
            self._rows.precondition(preconditioner)

    def drop_batch(self) -> None:
        """Forget a batch whose loss never came, and a step that was never taken."""
        if self._current is not None:
            self._rows.end_backward()
            self._current = None
        if self._facts is not None:
            self._forget_step()

    def _forget_step(self) -> None:
        self._facts = self._scale = self._audited = None
        self._pending = []


def _shared(words: Sequence[str]) -> str:
    """Return the one word that is said throughout, or none."""
    return words[0] if len(set(words)) == 1 else ""
