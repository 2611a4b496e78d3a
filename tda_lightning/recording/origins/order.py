"""Which sample's data are in the rows that the recorder assigns to each sample.

The recorder proves which rows belong to the same sample, from the loss to the first parameters. It
takes the samples to be in the order of the batch. The origins of the data show their actual order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from math import inf, prod
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from tda_lightning.gradients.graph.sample_layout import (
    IrregularRows,
    SampleLayout,
    possible_layouts,
)
from tda_lightning.gradients.graph.walk import Node, output_shape
from tda_lightning.recording.origins.operations import Origins
from tda_lightning.recording.origins.tracker import DataMeeting

Rows = SampleLayout | IrregularRows
# Returns where the samples lie in the output of a node, if that is known.
RowsOf = Callable[[Node], Rows | None]

_VIEWS = (
    "View",
    "Reshape",
    "Unsafe",
    "Transpose",
    "TB",
    "Permute",
    "Squeeze",
    "Unsqueeze",
    "ToCopy",
)
_PICKING = ("Index", "Gather", "Masked", "Take", "Sort", "Flip", "Roll")
_MAX_SEARCHED_NODES = 12
# Samples whose origins are counted one by one.
_MAX_COUNTED = 8


class MixedSamplesError(ValueError):
    """Rows that hold several samples under the id of one."""


def actual_order(meetings: Sequence[DataMeeting], n: int, rows_of: RowsOf) -> Int[Tensor, " n"]:
    """Return the sample whose data the rows of each sample hold, as the recorder assigns them.

    Args:
        meetings: Where data of the batch have met tensors that require a gradient.
        n: Number of samples.
        rows_of: Returns where the recorder takes the samples to lie in the output of a node.

    Raises:
        MixedSamplesError: If some rows hold data of several samples.
    """
    order = torch.full((n,), -1)
    placed = [(_rows_behind(meeting.node, rows_of), meeting) for meeting in meetings]
    is_regular = not any(isinstance(rows, IrregularRows) for (rows, _), _ in placed)
    for (rows, shape), (node, origins, _) in placed:
        if rows is not None:
            samples = _through(origins, shape, rows, n)
        elif is_regular and not _is_picked(node):
            samples = _by_shape(origins, n)
        else:
            samples = None
            _require_single(origins, n)
        order = order if samples is None else _agreed(order, samples)
    return torch.where(order >= 0, order, torch.arange(n))


def order_of_rows(tensors: Iterable[Origins], n: int) -> Int[Tensor, " n"]:
    """Return the sample whose data the rows of a batch hold.

    Only tensors with one row of each sample count: the number of other rows may be ``n`` by chance.

    Args:
        tensors: The origins of the tensors in the batch.
        n: Number of samples.

    Raises:
        MixedSamplesError: If some rows hold data of several samples.
    """
    everyone = torch.arange(n)
    orders = {
        tuple(samples.tolist())
        for origins in tensors
        if (samples := _samples_in_rows(origins, n)) is not None
        and torch.equal(samples.sort().values, everyone)
    }
    if len(orders) > 1:
        raise MixedSamplesError
    return torch.tensor(orders.pop()) if orders else everyone


def are_elements(origins: Origins, n: int) -> bool:
    """Return whether the rows of a tensor hold single samples, some of them in several rows."""
    samples = _samples_in_rows(origins, n)
    if samples is None or bool((samples < 0).any()):
        return False
    return not torch.equal(samples.sort().values, torch.arange(n))


def _samples_in_rows(origins: Origins, n: int) -> Int[Tensor, " n"] | None:
    """Return the samples in the ``n`` rows of a tensor, ``None`` if they are unknown."""
    has_rows = origins.low.ndim > 0 and len(origins.low) == n
    return _samples(origins, torch.arange(n), n) if has_rows else None


def _agreed(order: Int[Tensor, " n"], samples: Int[Tensor, " n"]) -> Int[Tensor, " n"]:
    """Return the samples of both, -1 for none; an error if they differ."""
    if bool(((order != samples) & (order >= 0) & (samples >= 0)).any()):
        raise MixedSamplesError
    return torch.where(samples >= 0, samples, order)


def _rows_behind(node: Node, rows_of: RowsOf) -> tuple[Rows | None, tuple[int, ...]]:
    """Return where the samples lie in the operation behind some views, and the shape there."""
    current: Any = node
    for _ in range(_MAX_SEARCHED_NODES):
        rows = rows_of(current)
        if rows is not None:
            return rows, output_shape((current, 0))
        if not type(current).__name__.startswith(_VIEWS) or not current.next_functions:
            break
        current = current.next_functions[0][0]
    return None, ()


def _is_picked(node: Node) -> bool:
    """Return whether outputs of the model have been moved before an operation."""
    waiting, seen = [node], {node}
    while waiting and len(seen) < _MAX_SEARCHED_NODES:
        for child, _ in waiting.pop().next_functions:
            if child is not None and type(child).__name__.startswith(_PICKING):
                return True
            if child is not None and child not in seen:
                seen.add(child)
                waiting.append(child)
    return False


def _through(
    origins: Origins, shape: Sequence[int], rows: Rows, n: int
) -> Int[Tensor, " n"] | None:
    """Return the samples in the rows of an operation's input, whose output has a shape."""
    size, axis = shape[rows.axis], rows.axis
    if axis < origins.low.ndim and origins.low.shape[axis] == size:
        by_row = _along(origins, axis)
    elif axis == 0 and _leading(origins.low.shape, size):
        by_row = origins.through(lambda part: part.reshape(size, -1))
    else:
        return None
    owners = rows.owners(size, n)
    if isinstance(rows, IrregularRows) and rows.is_known is not None:
        known = rows.is_known.nonzero()[:, 0].cpu()
        by_row = by_row.through(lambda part: part[known.to(part.device)])
        owners = owners.cpu()[known]
    return _samples(by_row, owners, n)


def _along(origins: Origins, axis: int) -> Origins:
    return origins.through(lambda part: part.movedim(axis, 0))


def _leading(shape: Sequence[int], size: int) -> bool:
    return any(prod(shape[:count]) == size for count in range(1, len(shape) + 1))


def _require_single(origins: Origins, n: int) -> None:
    """Raise an error if the entries of rows in an unknown order hold a few samples each."""
    if bool((origins.low < origins.high).any()):
        size = origins.low.shape[0] if origins.low.ndim else 1
        _samples(origins.through(lambda part: part.reshape(size, -1)), torch.arange(size), n)


def _by_shape(origins: Origins, n: int) -> Int[Tensor, " n"] | None:
    """Return the samples of data that meet outputs of the model, by the shape that both have."""
    for layout in possible_layouts(origins.low.shape, n, (0, 1)):
        axis, size = layout.axis, origins.low.shape[layout.axis]
        try:
            samples = _samples(_along(origins, axis), layout.owners(size, n), n)
        except MixedSamplesError:
            if size == n:  # Other sizes may be joined in another way.
                raise
            continue
        if samples is not None:
            return samples
    _require_single(origins, n)
    return None


def _samples(by_row: Origins, owners: Tensor, n: int) -> Int[Tensor, " n"] | None:
    """Return the sample in the rows of each owner, -1 if they hold none.

    Samples that are all compared with each other, as in contrastive losses, have none: ``None``.

    Raises:
        MixedSamplesError: If the rows of an owner hold a few samples.
    """
    if not by_row.low.numel():
        return None
    low = by_row.low.reshape(len(owners), -1)
    high = by_row.high.reshape(len(owners), -1)
    lows, highs = low.amin(1).float().cpu(), high.amax(1).float().cpu()
    owners, n_owners = owners.cpu(), max(n, int(owners.max()) + 1)
    lowest = torch.full((n_owners,), inf, dtype=lows.dtype)
    lowest = lowest.scatter_reduce(0, owners, lows, "amin")
    highest = torch.full((n_owners,), -inf, dtype=lows.dtype)
    highest = highest.scatter_reduce(0, owners, highs, "amax")
    several = (lowest < highest).nonzero()[:_MAX_COUNTED, 0]
    owners = owners.to(low.device)
    counts = [_count(low[owners == owner], high[owners == owner]) for owner in several.tolist()]
    if counts:
        if max(counts) <= max(2, n // 2) and max(counts) < n:
            raise MixedSamplesError
        return None
    return torch.where(lowest == highest, lowest, -1).long()


def _count(low: Tensor, high: Tensor) -> int:
    """Return the number of samples in some rows."""
    values = torch.cat([low.flatten(), high.flatten()]).float()
    return len(set(values[values.isfinite()].tolist()))
