"""Session: from the events of one training to its steps, without a word of Lightning.

Micro-batches wait here until the optimizer step that they join.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from tda_lightning.callbacks.facts import read_groups
from tda_lightning.conservation import require_conserved
from tda_lightning.coordinates import OptimizerCoordinates
from tda_lightning.recipe import Block
from tda_lightning.rows import BatchRows, RowRecorder
from tda_lightning.step import Audit, ParameterGroup, Preconditioner, Step

# Labels are sampled from seeds of their own for every batch of every step.
_SEEDS_PER_STEP = 4096


@dataclass(frozen=True)
class _Visits:
    sample_ids: Int[Tensor, " n"]
    weight: float
    recorded: BatchRows


@dataclass(frozen=True)
class _Facts:
    index: int
    epoch: int
    optimizer: str
    groups: tuple[ParameterGroup, ...]
    probe: Parameter | None
    probe_norm: Tensor | None
    audited: _Audited | None


@dataclass(frozen=True)
class _Audited:
    """What an audited step looked like before it was taken; sketches, block by block."""

    recorded: Float[Tensor, "blocks k"]
    gradient: Float[Tensor, "blocks k"]
    weights: Float[Tensor, "blocks k"]
    left_out: Tensor


class Session:
    """Turns batches and optimizer steps into :class:`Step`.

    Args:
        rows: Records the rows of a batch.
        blocks: The recorded layers.
        reduction: How the training loss combines the samples of a batch.
        coordinates: The coordinates of the optimizer, unless rows are to be raw.
        audit_every: Audit the first recorded step and every so many after it; 0 for the first only.
    """

    def __init__(
        self,
        rows: RowRecorder,
        blocks: Sequence[Block],
        reduction: Literal["mean", "sum"],
        coordinates: OptimizerCoordinates | None,
        audit_every: int,
    ) -> None:
        self._rows = rows
        self._blocks = blocks
        self._reduction = reduction
        self._coordinates = coordinates
        self._begun: Preconditioner | None = None
        self._audit_every = audit_every
        self._steps = 0
        self._current: tuple[Int[Tensor, " n"], float] | None = None
        self._share = 1.0
        self._pending: list[_Visits] = []
        self._facts: _Facts | None = None
        self._probes: list[Parameter] = []

    def start_batch(self, index: int, sample_ids: Int[Tensor, " n"], share: float) -> None:
        """Expect the forward pass of a batch.

        Args:
            index: Number of optimizer steps taken so far.
            sample_ids: Its samples.
            share: Factor of its loss in the step's loss (less than 1 under accumulation).
        """
        n = len(sample_ids)
        self._share = share
        self._current = (sample_ids, share / n if self._reduction == "mean" else share)
        if not self._pending and self._is_audit_due():
            self._rows.sum_blocks()
        self._rows.seed(_SEEDS_PER_STEP * index + len(self._pending))
        self._rows.start(n)

    def start_backward(self, loss: Tensor) -> None:
        """Expect the backward pass of that batch's loss."""
        if self._current is not None:
            self._follow_coordinates(loss)
            self._rows.listen(loss)

    def _follow_coordinates(self, loss: Tensor) -> None:
        coordinates = self._coordinates
        # A step has one set of coordinates: that of its first batch.
        if coordinates is None or self._pending or not coordinates.is_due():
            return
        gradients = {}
        if coordinates.needs_gradients():
            gradients = _gradients_of(loss / self._share, coordinates.parameters())
        self._begun = coordinates.read(gradients)
        self._rows.precondition(self._begun)

    def end_backward(self) -> None:
        """Keep the rows of that batch for the step they will join."""
        if self._current is not None:
            sample_ids, weight = self._current
            self._pending.append(_Visits(sample_ids, weight, self._rows.finish()))
            self._current = None

    def before_step(self, index: int, epoch: int, optimizer: Optimizer) -> None:
        """Read what the optimizer is about to use; gradients are complete and not yet clipped."""
        if not self._pending:
            return
        audited = self._start_audit() if self._is_audit_due() else None
        self._probes = self._probes or _by_size(optimizer)
        probe = _smallest_with_gradient(self._probes)
        self._facts = _Facts(
            index=index,
            epoch=epoch,
            optimizer=type(optimizer).__name__,
            groups=read_groups(optimizer),
            probe=probe,
            probe_norm=None if probe is None else _gradient_norm(probe),
            audited=audited,
        )

    def after_step(self) -> Step | None:
        """Return the step that was taken since the last call, or ``None`` if none was recorded."""
        if self._facts is None:
            return None
        facts, visits = self._facts, self._pending
        self._facts, self._pending = None, []
        self._steps += 1
        clipped = float(_clip_coefficient(facts))
        weights = [torch.full((len(one.sample_ids),), one.weight) for one in visits]
        sketch = _joined([one.recorded.rows for one in visits], clipped)
        assert sketch is not None
        begun, self._begun = self._begun, None
        return Step(
            index=facts.index,
            epoch=facts.epoch,
            optimizer=facts.optimizer,
            groups=facts.groups,
            sample_ids=torch.cat([one.sample_ids for one in visits]),
            weights=torch.cat(weights) * clipped,
            sketch=sketch,
            audit=None if facts.audited is None else self._finish_audit(facts.audited),
            terms=_joined([one.recorded.terms for one in visits]),
            curvature=_joined([one.recorded.curvature(one.weight) for one in visits]),
            # Curvature goes with the loss, and a row is a square root of it.
            curvature_rows=_joined([one.recorded.curvature_rows for one in visits], clipped**0.5),
            preconditioner=begun,
        )

    def _is_audit_due(self) -> bool:
        return self._steps == 0 or bool(self._audit_every and self._steps % self._audit_every == 0)

    def _start_audit(self) -> _Audited:
        rows = self._rows
        recorded, gradient = rows.block_sums(), rows.sketch_gradient()
        if self._steps == 0:
            require_conserved(self._blocks, recorded, gradient)
        return _Audited(recorded, gradient, rows.sketch_weights(), rows.left_out_gradient())

    def _finish_audit(self, before: _Audited) -> Audit:
        update = (self._rows.sketch_weights() - before.weights).sum(dim=0)
        along = torch.nn.functional.cosine_similarity(update, before.recorded.sum(dim=0), dim=0)
        return Audit(
            gradient=before.gradient.square().sum(dim=1).double().cpu(),
            deviation=(before.recorded - before.gradient).square().sum(dim=1).double().cpu(),
            left_out=float(before.left_out),
            update=float(along.square()),
        )

    def drop_batch(self) -> None:
        """Forget a batch whose loss never came."""
        if self._current is not None:
            self._rows.finish()
            self._current = None


def _gradients_of(loss: Tensor, parameters: Sequence[Parameter]) -> dict[Parameter, Tensor]:
    try:
        found = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
    except RuntimeError as error:
        raise ValueError(
            "The gradient of the first steps could not be taken beforehand, which the coordinates "
            f"of an adaptive optimizer need: {error} Expected a loss that can be differentiated "
            "twice over one graph. Use checkpointing with `use_reentrant=False`, or record raw "
            "rows with `GradientRecorder(preconditioner='none')`."
        ) from error
    pairs = zip(parameters, found, strict=True)
    return {parameter: grad for parameter, grad in pairs if grad is not None}


def _joined(parts: Sequence[Tensor | None], factor: float = 1.0) -> Tensor | None:
    """Join what the batches of a step left, on the CPU; nothing, if one of them left nothing."""
    known = [part for part in parts if part is not None]
    if len(known) < len(parts):
        return None
    whole = torch.cat(known) if len(known) > 1 else known[0]
    return (whole if factor == 1 else whole * factor).cpu()


def _smallest_with_gradient(parameters: Iterable[Parameter]) -> Parameter | None:
    """Choose a gradient that is cheap to watch; clipping by norm scales all alike."""
    for parameter in parameters:
        if parameter.grad is not None and bool(parameter.grad.any()):
            return parameter
    return None


def _by_size(optimizer: Optimizer) -> list[Parameter]:
    parameters = [one for group in optimizer.param_groups for one in group["params"]]
    return sorted(parameters, key=lambda one: int(one.numel()))


def _gradient_norm(parameter: Parameter) -> Tensor:
    assert parameter.grad is not None
    norm: Tensor = torch.linalg.vector_norm(parameter.grad, dtype=torch.float64)
    return norm


def _clip_coefficient(facts: _Facts) -> Tensor:
    if facts.probe is None or facts.probe_norm is None or facts.probe.grad is None:
        return torch.ones((), dtype=torch.float64)
    # `.grad` survives, clipped, until the next step's `zero_grad`.
    return _gradient_norm(facts.probe) / facts.probe_norm
