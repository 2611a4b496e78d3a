"""TakenStep: a step that the optimizer has taken, with rows that may still be on the device.

:class:`HyperparameterReader` reads the optimizer's values before it takes the step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import isfinite
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.optim import ASGD, SGD, Optimizer

from tda_lightning.gradients.parameter_selection import ParameterSelection
from tda_lightning.gradients.row_pass import BatchRows
from tda_lightning.recording.optimizer_gradients import GradientScale, Scaling, scaling_between
from tda_lightning.recording.preconditioning import OptimizerPreconditioner
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


class HyperparameterReader:
    """Reads the hyper-parameters of one optimizer's parameter groups."""

    def __init__(
        self, selection: ParameterSelection, preconditioner: OptimizerPreconditioner | None
    ) -> None:
        self._preconditioner = preconditioner
        self._sizes = {p: int(p.numel()) for p in selection.all_parameters()}
        self._total = sum(block.size for block in selection.blocks)
        self._first_block = next(n for n, part in enumerate(selection.parameters) if part)
        # The share of each parameter group, by the numbers of parameters in the groups.
        self._shares: dict[tuple[int, ...], list[float]] = {}

    def read(self, optimizer: Optimizer) -> tuple[ParameterGroup, ...]:
        """Return the hyper-parameters of every group, with its share of recorded parameters."""
        is_adaptive = self._preconditioner is not None and self._preconditioner.is_adaptive()
        descent = float(is_adaptive or isinstance(optimizer, SGD | ASGD))
        pairs = zip(read_groups(optimizer), self._shares_of(optimizer), strict=True)
        return tuple(
            replace(group, share=share, descent=descent, owner=float(self._first_block))
            for group, share in pairs
        )

    def _shares_of(self, optimizer: Optimizer) -> list[float]:
        groups = [group["params"] for group in optimizer.param_groups]
        counts = tuple(map(len, groups))
        if counts not in self._shares:
            recorded = [sum(self._sizes.get(p, 0) for p in group) for group in groups]
            self._shares[counts] = [size / self._total for size in recorded]
        return self._shares[counts]


def read_groups(optimizer: Optimizer) -> tuple[ParameterGroup, ...]:
    """Return the current hyper-parameters of every parameter group."""
    return tuple(_read_group(group) for group in optimizer.param_groups)


def _read_group(group: Mapping[str, Any]) -> ParameterGroup:
    # Some optimizers have no betas. Adan has three, of which the first two are used.
    betas: Sequence[float] = group.get("betas", ())
    beta1, beta2, *_ = (*betas, 0.0, 0.0)
    eps = group.get("eps", 0.0)
    return ParameterGroup(
        lr=float(group["lr"]),
        weight_decay=float(group.get("weight_decay", 0.0)),
        momentum=float(group.get("momentum", 0.0)),
        dampening=float(group.get("dampening", 0.0)),
        beta1=float(beta1),
        beta2=float(beta2),
        # Adafactor has a pair; neither is the term that others add to a denominator.
        eps=0.0 if isinstance(eps, tuple | list) else float(eps),
        nesterov=float(group.get("nesterov", False)),
        decoupled=float(group.get("decoupled_weight_decay", False)),
    )


class TakenStep:
    """A step that the optimizer has taken. Its tensors travel to the CPU in one copy.

    ``scale`` is measured after the step. ``preconditioner`` holds new coordinates, if they begin
    with it.

    Attributes:
        scaling: How its gradients were scaled; known once it has been finished.
    """

    scaling: Scaling

    def __init__(
        self,
        label: StepLabel,
        batches: Sequence[BatchVisits],
        scale: GradientScale,
        audit: Audit | None,
        preconditioner: Preconditioner | None,
    ) -> None:
        self._label, self._batches = label, batches
        self._scale_before = scale.factor_before
        self._audit, self._preconditioner = audit, preconditioner
        columns = joined([_columns_of(batch) for batch in batches])
        self._names = list(columns)
        norms = [norm.to(columns["sketch"].device) for norm in scale.norms()]
        self._copy = HostCopy([*norms, *columns.values()])

    @property
    def is_ready(self) -> bool:
        """Whether :meth:`finish` returns at once, since nothing is on a device."""
        return self._copy.is_ready

    def finish(self) -> Step:
        """Wait for the tensors, and return the step."""
        before, after, *values = self._copy.read()
        columns = dict(zip(self._names, values, strict=True))
        sketch = columns["sketch"]
        batches = self._batches
        sizes = [len(batch.sample_ids) for batch in batches]
        self.scaling = scaling_between(before, after, torch.split(sketch, sizes))
        scale = self._scale_before * self.scaling.factor
        factors = [batch.applied * scale for batch in batches]
        weights = [
            torch.full((size,), batch.weight * factor)
            for size, batch, factor in zip(sizes, batches, factors, strict=True)
        ]
        # If the scale is NaN, so are the weights. Unscaled rows show which samples are the cause.
        is_finite = isfinite(scale)
        # Curvature scales with the loss, and its rows with the square root.
        roots = [factor**0.5 for factor in factors]
        facts: dict[str, Any] = {name: columns.get(name) for name in OPTIONAL_FACTS}
        names = {batch.recorded.loss.name for batch in batches}
        return Step(
            **vars(self._label),
            sample_ids=torch.cat([batch.sample_ids for batch in batches]),
            weights=torch.cat(weights),
            sketch=_scaled(sketch, sizes, factors) if is_finite else sketch,
            audit=self._audit,
            **facts,
            curvature_rows=self._scaled_curvature_rows(columns.get("curvature_rows"), roots),
            preconditioner=self._preconditioner,
            loss=names.pop() if len(names) == 1 else "",
        )

    def _scaled_curvature_rows(
        self, rows: Tensor | None, factors: Sequence[float]
    ) -> Tensor | None:
        if rows is None:
            return None
        parts = [batch.recorded.curvature_rows for batch in self._batches]
        return _scaled(rows, [0 if part is None else len(part) for part in parts], factors)


def _columns_of(batch: BatchVisits) -> dict[str, Tensor | None]:
    recorded = batch.recorded
    return {
        "sketch": recorded.rows,
        **recorded.loss.of_visits(batch.weight),
        "curvature_rows": recorded.curvature_rows,
    }


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
