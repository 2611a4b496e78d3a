"""Which sample each row belongs to, where a batch joins the elements of its samples.

Graphs of a batch are joined to one, sentences are packed into one row, point clouds lie one below
the other. Their batches state which elements are of one sample, in one of four ways: the number of
the sample for each element, the positions where samples begin, the number of elements of each
sample, or the position of each element in its sample.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Set
from math import exp, lgamma, log
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from tda_lightning.gradients.graph.sample_layout import (
    IrregularRows,
    KnownRows,
    SampleLayout,
    possible_layouts,
)
from tda_lightning.recording.collation import tensors_of_samples
from tda_lightning.recording.origins.tracker import DataMeeting, OriginTracker

_INTEGERS = (torch.int64, torch.int32)
# Returns the sample of each element, `None` if a tensor of whole numbers does not state it.
Reading = Callable[[Tensor, int], Tensor | None]
# A tensor that looks like a statement with a smaller chance is one.
_MAX_CHANCE = 1e-6


class StatedRows:
    """Reads whose the joined rows of batches are, and remembers which tensors state it.

    At first, a statement must name every sample, and more rows than samples: labels of elements may
    look like any other. Once batches in a row have stated it so that it is no chance, the same
    tensor may state that samples are empty.
    """

    def __init__(self) -> None:
        # The chance that a tensor looked like a statement in all batches since it did not. By the
        # form of the batch: loaders in turns may have others.
        self._chances: dict[object, dict[tuple[int, Reading], float]] = {}

    def of(self, batch: Any, n: int) -> dict[int, IrregularRows]:
        """Return the samples of joined rows, by the number of rows, as far as a batch states them.

        Args:
            batch: The batch.
            n: Number of its samples.
        """
        # All samples may be packed into one entry.
        tensors = [
            each[0] if each.ndim > 1 and len(each) == 1 else each
            for each in _tensors(batch)
            if each.ndim
        ]
        sizes = {len(each) for each in tensors}
        form = tuple((each.ndim, each.dtype) for each in tensors)
        chances = self._chances.get(form, {})
        if n == 1 or not (chances or any(size > n for size in sizes)):
            return {}  # Nothing is read from the device then.
        integers = {
            number: each.cpu()
            for number, each in enumerate(tensors)
            if each.ndim == 1 and each.dtype in _INTEGERS
        }
        known = {
            number: _WITH_EMPTY_SAMPLES.get(reading, reading)(integers[number], n)
            for (number, reading), chance in chances.items()
            if chance < _MAX_CHANCE
        }
        if stated := _agreed(known, sizes, n):
            return stated
        new = self._chances[form] = {}
        for reading in (_starts, _numbers, _lengths, _positions):
            owners = {number: reading(values, n) for number, values in integers.items()}
            is_plain = reading is _starts  # Nothing else has an entry more than there are samples.
            found = _agreed(owners, {size for size in sizes if is_plain or size > n}, n)
            for number, each in owners.items():
                if each is not None and len(each) in found:
                    place = number, reading
                    new[place] = chances.get(place, 1.0) * _chance(reading, len(each), n)
            stated = {**found, **stated}
        return stated


def _chance(reading: Reading, m: int, n: int) -> float:
    """Return about how likely whole numbers look like a statement of ``m`` elements by chance."""
    if reading is not _numbers:
        return 1 / m
    # Of n ** m sequences, those that rise in steps of 1 from the first sample to the last.
    return exp(lgamma(m) - lgamma(n) - lgamma(m - n + 1) - m * log(n))


def _agreed(
    statements: Mapping[int, Tensor | None], sizes: Set[int], n: int
) -> dict[int, IrregularRows]:
    """Return the samples of rows on which all statements of a number of rows agree."""
    by_size: dict[int, list[Tensor]] = {}
    for owners in statements.values():
        if owners is not None and len(owners) in sizes:
            by_size.setdefault(len(owners), []).append(owners)
    return {
        size: IrregularRows(first, n)
        for size, (first, *others) in by_size.items()
        if all(torch.equal(first, other) for other in others)
    }


def followable(batch: Any, n: int, stated: Collection[int]) -> Iterator[Tensor]:
    """Yield the tensors of a batch whose ``n`` rows are its samples.

    Two rows of numbers beside joined elements are the edges of graphs.

    Args:
        batch: The batch.
        n: Number of its samples.
        stated: Numbers of joined rows; with ``n`` among them, no tensor surely has samples.
    """
    for tensor in tensors_of_samples(batch, n) if n not in stated else ():
        if not (stated and n == 2 and tensor.ndim == 2 and tensor.dtype in _INTEGERS):
            yield tensor


def tracker_of(batch: Any, n: int, stated: Mapping[int, IrregularRows]) -> OriginTracker:
    """Return a tracker of a batch's samples, and of its joined elements.

    Args:
        batch: The batch.
        n: Number of its samples.
        stated: The samples of joined rows, by the number of rows.
    """
    tracker = OriginTracker(followable(batch, n, stated), n)
    for tensor in _tensors(batch):
        rows = stated.get(len(tensor)) if tensor.ndim else None
        if rows is not None:
            tracker.follow_elements([tensor], rows.of_rows)
    return tracker


def _tensors(value: Any) -> Iterator[Tensor]:
    """Yield the tensors of a batch, and its lists of whole numbers as such."""
    if isinstance(value, Tensor):
        yield value
        return
    if not isinstance(value, Mapping) and hasattr(value, "to_dict"):  # Batches of graphs.
        value = value.to_dict()
    if isinstance(value, Mapping):
        value = list(value.values())
    if not isinstance(value, list | tuple):
        return
    if value and all(type(each) is int for each in value):
        yield torch.tensor(value)
    for each in value:
        yield from _tensors(each)


def _numbers(values: Int[Tensor, " m"], n: int) -> Tensor | None:
    """Return the numbers of the samples of elements in order, if these are such numbers."""
    if len(values) <= n or int(values[0]) != 0 or int(values[-1]) != n - 1:
        return None
    steps = values.diff()
    return values.long() if bool(((steps == 0) | (steps == 1)).all()) else None


def _numbers_of_some(values: Int[Tensor, " m"], n: int) -> Tensor | None:
    """Return the numbers of the samples of elements in order, if these may be such numbers."""
    if not len(values) or int(values[0]) < 0 or int(values[-1]) >= n:
        return None
    return values.long() if bool((values.diff() >= 0).all()) else None


def _starts(values: Int[Tensor, " m"], n: int) -> Tensor | None:
    is_possible = len(values) == n + 1 and int(values[0]) == 0
    return _lengths(values.diff(), n) if is_possible else None


def _lengths(values: Int[Tensor, " m"], n: int) -> Tensor | None:
    if len(values) != n or bool((values < 0).any()):
        return None
    return torch.repeat_interleave(torch.arange(n), values.long())


def _positions(values: Int[Tensor, " m"], n: int) -> Tensor | None:
    """Return the samples of elements that are counted from zero in each sample."""
    is_first = values == 0
    if len(values) <= n or not is_first[0] or int(is_first.sum()) != n:
        return None
    goes_on = values[1:] == values[:-1] + 1
    return is_first.cumsum(0) - 1 if bool((goes_on | is_first[1:]).all()) else None


# The readings of statements which allow that samples are empty.
_WITH_EMPTY_SAMPLES: dict[Reading, Reading] = {_numbers: _numbers_of_some}


def followed_rows(
    meetings: Iterable[DataMeeting], n: int
) -> dict[int, SampleLayout | IrregularRows]:
    """Return the samples of rows to which the step joins those of the batch, by their number.

    Args:
        meetings: Where data of the batch have met tensors that require a gradient.
        n: Number of samples.
    """
    found: dict[int, list[Tensor]] = {}
    for _, origins, _ in meetings:
        shape = origins.low.shape
        if len(shape) == 0 or shape[0] <= n:
            continue
        low, high = (part.reshape(shape[0], -1) for part in (origins.low, origins.high))
        owners = low.amin(1)
        if bool((owners == high.amax(1)).all()):
            found.setdefault(shape[0], []).append(owners.long().cpu())
    return {
        size: _layout_of(first, n)
        for size, (first, *others) in found.items()
        if all(torch.equal(first, other) for other in others)
    }


def known_rows(
    stated: Mapping[int, IrregularRows],
    followed: Mapping[int, SampleLayout | IrregularRows],
    repeated: Mapping[int, SampleLayout],
) -> KnownRows:
    """Return whose rows a batch has: what it states, unless the step moves the elements.

    Args:
        stated: Rows whose samples the batch states, by their number.
        followed: Rows to which the samples were followed.
        repeated: Rows in which labels are repeated.
    """
    moved = {
        size: followed[size]
        for size, rows in stated.items()
        if size in followed and not torch.equal(followed[size].owners(size, rows.n), rows.of_rows)
    }
    others = {**repeated, **followed}
    others = {size: rows for size, rows in others.items() if size not in stated}
    return KnownRows({**stated, **moved}, others)


def _layout_of(owners: Int[Tensor, " rows"], n: int) -> SampleLayout | IrregularRows:
    """Return the regular layout with the given owners, if there is one."""
    size = len(owners)
    layouts = possible_layouts((size,), n, (0,))
    regular = (each for each in layouts if torch.equal(each.owners(size, n), owners))
    return next(regular, IrregularRows(owners, n))
