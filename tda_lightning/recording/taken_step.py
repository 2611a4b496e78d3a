"""TakenStep: a step that the optimizer has taken; StepsTogether: several, finished at once."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tda_lightning.gradients.losses import DeferredSummary, LossFacts, facts_of
from tda_lightning.gradients.row_pass import BatchRows
from tda_lightning.recording.optimizer_gradients import GradientScale, scaling_between
from tda_lightning.stores.step import OPTIONAL_FACTS, Audit, ParameterGroup, Preconditioner, Step


@dataclass(frozen=True)
class BatchVisits:
    """The visits of one batch.

    Attributes:
        sample_ids: The samples of the batch.
        weight: Weight of each sample's loss in the loss of the backward pass.
        applied: Factor from the gradient of that loss to the gradient that the optimizer uses: it
            removes the loss scale and contains the share of this process.
        recorded: The recorded rows.
    """

    sample_ids: Int[Tensor, " n"]
    weight: float
    applied: float
    recorded: BatchRows


@dataclass(frozen=True)
class StepLabel:
    """The number of steps taken before a step, and the optimizer's values at that time."""

    index: int
    epoch: int
    optimizer: str
    groups: tuple[ParameterGroup, ...]


class WaitingStep(ABC):
    """A step whose losses are still to be computed, with ``size`` numbers in its rows."""

    size: int

    @property
    @abstractmethod
    def summaries(self) -> Sequence[DeferredSummary]:
        """The summaries of the losses of its batches."""

    @abstractmethod
    def columns(self, facts: Sequence[LossFacts]) -> dict[str, Tensor]:
        """Return the tensors that travel to the CPU, given the facts of each batch."""

    @abstractmethod
    def finish(self, columns: Mapping[str, Tensor]) -> Step:
        """Return the step, given the columns on the CPU."""


class TakenStep(WaitingStep):
    """A step that the optimizer has taken.

    ``scale`` is measured after the step. ``preconditioner`` holds new coordinates, if they begin
    with it.

    Attributes:
        index: Number of steps taken before it.
        size: Numbers in its rows.
        scaling: How its gradients were scaled: on a device, known once it has been finished.
    """

    def __init__(
        self,
        label: StepLabel,
        batches: Sequence[BatchVisits],
        scale: GradientScale,
        audit: Audit | None,
        preconditioner: Preconditioner | None,
    ) -> None:
        self.index = label.index
        self._label, self._batches = label, batches
        self._scale_before = scale.factor_before
        self._audit, self._preconditioner = audit, preconditioner
        self._norms = scale.norms()
        rows = [batch.recorded.rows for batch in batches]
        self.size = sum(part.numel() for part in rows)
        is_known = all(norms.device.type == "cpu" for norms in self._norms)
        self.scaling = scaling_between(*self._norms, rows) if is_known else None

    @property
    def summaries(self) -> list[DeferredSummary]:
        """The summaries of the losses of its batches."""
        return [batch.recorded.loss for batch in self._batches]

    def columns(self, facts: Sequence[LossFacts]) -> dict[str, Tensor]:
        """Return the tensors that travel to the CPU, given the facts of each batch."""
        pairs = zip(self._batches, facts, strict=True)
        columns = joined([_columns_of(batch, facts) for batch, facts in pairs])
        if self.scaling is None:
            device = columns["sketch"].device
            before, after = (norms.to(device) for norms in self._norms)
            columns.update(before=before, after=after)
        return columns

    def finish(self, columns: Mapping[str, Tensor]) -> Step:
        """Return the step, given the columns on the CPU."""
        sketch, batches = columns["sketch"], self._batches
        sizes = [len(batch.sample_ids) for batch in batches]
        if self.scaling is None:
            rows = torch.split(sketch, sizes)
            self.scaling = scaling_between(columns["before"], columns["after"], rows)
        scale = self._scale_before * self.scaling.factor
        factors = [batch.applied * scale for batch in batches]
        weights = [
            torch.full((size,), batch.weight * factor)
            for size, batch, factor in zip(sizes, batches, factors, strict=True)
        ]
        # If the scale is NaN, so are the weights. Unscaled rows show which samples are the cause.
        is_finite = isfinite(scale)
        # Curvature scales with the loss, and its rows with the square root.
        roots, curvature = [factor**0.5 for factor in factors], columns.get("curvature_rows")
        counts = [
            0 if (r := batch.recorded.curvature_rows) is None else len(r) for batch in batches
        ]
        facts: dict[str, Any] = {name: columns.get(name) for name in OPTIONAL_FACTS}
        return Step(
            **vars(self._label),
            sample_ids=torch.cat([batch.sample_ids for batch in batches]),
            weights=torch.cat(weights),
            sketch=_scaled(sketch, sizes, factors) if is_finite else sketch,
            audit=self._audit,
            **facts,
            curvature_rows=None if curvature is None else _scaled(curvature, counts, roots),
            preconditioner=self._preconditioner,
            loss=common_name(self.summaries),
        )


def _columns_of(batch: BatchVisits, facts: LossFacts) -> dict[str, Tensor | None]:
    return {
        "sketch": batch.recorded.rows,
        **facts.of_visits(batch.weight),
        "curvature_rows": batch.recorded.curvature_rows,
    }


def common_name(summaries: Sequence[DeferredSummary]) -> str:
    """Return the name of the losses of a step, empty if they differ."""
    names = {summary.name for summary in summaries}
    return names.pop() if len(names) == 1 else ""


def joined(batches: Sequence[dict[str, Tensor | None]]) -> dict[str, Tensor]:
    """Concatenate the columns of several batches, without those that a batch lacks."""
    columns = {}
    for name in batches[0]:
        parts = [part for batch in batches if (part := batch[name]) is not None]
        if len(parts) == len(batches):
            columns[name] = torch.cat(parts) if len(parts) > 1 else parts[0]
    return columns


def _scaled(
    rows: Float[Tensor, "n k"], sizes: Sequence[int], factors: Sequence[float]
) -> Float[Tensor, "n k"]:
    if all(factor == 1 for factor in factors):
        return rows
    parts = zip(torch.split(rows, list(sizes)), factors, strict=True)
    return torch.cat([part * factor for part, factor in parts])


class HostCopy:
    """A copy of several tensors to the CPU: begun at once, and awaited when it is read.

    All of them travel together. With CUDA the copy goes into pinned memory, so that neither the
    device nor Python waits for it, and an event tells when it is complete. On other devices Python
    waits: a copy in the background could be read too early. Tensors on the CPU are not copied.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._tensors = list(tensors)
        self._bytes: Tensor | None = None
        self._event: torch.cuda.Event | None = None
        if not self.is_ready:
            self._start(self._tensors)

    @property
    def is_ready(self) -> bool:
        """Whether the tensors were on the CPU, so that reading them never waits."""
        return all(tensor.device.type == "cpu" for tensor in self._tensors)

    def read(self) -> list[Tensor]:
        """Wait for the copy, and return the tensors on the CPU."""
        if self._bytes is None:
            return self._tensors
        if self._event is not None:
            self._event.synchronize()
        sizes = [tensor.numel() * tensor.itemsize for tensor in self._tensors]
        parts = torch.split(self._bytes, sizes)
        return [
            # Cloned where the offset is no multiple of the size of a number.
            (part if part.storage_offset() % tensor.itemsize == 0 else part.clone())
            .view(tensor.dtype)
            .view(tensor.shape)
            for part, tensor in zip(parts, self._tensors, strict=True)
        ]

    def _start(self, tensors: Sequence[Tensor]) -> None:
        joined = torch.cat([tensor.flatten().view(torch.uint8) for tensor in tensors])
        is_cuda = joined.device.type == "cuda"
        self._bytes = torch.empty(joined.shape, dtype=torch.uint8, pin_memory=is_cuda)
        self._bytes.copy_(joined, non_blocking=is_cuda)
        if is_cuda:
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._event.record(torch.cuda.current_stream(joined.device))


# Facts of so many steps are computed together, of this many seconds, or of so many numbers in rows.
_STEPS_TOGETHER, _SECONDS_TOGETHER, _NUMBERS_TOGETHER = 8, 0.5, 2**20

_Keep = Callable[[Step], None]


class StepsTogether:
    """Steps whose losses are computed together; all tensors travel to the CPU in one copy."""

    def __init__(self) -> None:
        self._since = 0.0
        # Steps that are computed and not kept yet, and those that wait. One assignment changes
        # both: an exception from a signal handler neither loses nor repeats them.
        self._steps: tuple[_ComputedSteps | None, list[tuple[WaitingStep, _Keep]]] = (None, [])

    def add(self, step: WaitingStep, keep: _Keep) -> None:
        """Add a step; ``keep`` is called with it once it is finished."""
        waiting, now = self._steps[1], time.monotonic()
        self._since = self._since if waiting else now
        waiting.append((step, keep))
        is_full = (len(waiting) + 1) * step.size > _NUMBERS_TOGETHER
        if is_full or len(waiting) >= _STEPS_TOGETHER or now - self._since >= _SECONDS_TOGETHER:
            self._compute()

    def flush(self) -> None:
        """Keep all steps."""
        self._compute()
        self._keep_computed()

    def _compute(self) -> None:
        """Compute the steps that wait, and keep them: on a device, once the next are computed."""
        self._keep_computed()
        if self._steps[1]:
            computed = _ComputedSteps(self._steps[1])
            self._steps = computed, []
            if computed.is_ready:
                self._keep_computed()

    def _keep_computed(self) -> None:
        computed, waiting = self._steps
        if computed is not None:
            computed.keep()
            self._steps = None, waiting


class _ComputedSteps:
    """Steps whose losses are computed, and whose tensors are on their way to the CPU."""

    def __init__(self, steps: Sequence[tuple[WaitingStep, _Keep]]) -> None:
        facts = iter(facts_of([each for step, _ in steps for each in step.summaries]))
        self._remaining: deque[tuple[WaitingStep, _Keep, list[str], slice]] = deque()
        copied: list[Tensor] = []
        for step, keep in steps:
            columns = step.columns([next(facts) for _ in step.summaries])
            place = slice(len(copied), len(copied) + len(columns))
            copied += columns.values()
            self._remaining.append((step, keep, list(columns), place))
        self._copy = HostCopy(copied)

    @property
    def is_ready(self) -> bool:
        """Whether nothing is on a device."""
        return self._copy.is_ready

    def keep(self) -> None:
        """Wait for the tensors; keep one step after the other, and forget it."""
        values = self._copy.read()
        # An exception from a signal handler loses the steps that are left: a run has no gap.
        remaining, self._remaining = self._remaining, deque()
        while remaining:
            step, keep, names, place = remaining.popleft()
            keep(step.finish(dict(zip(names, values[place], strict=True))))
