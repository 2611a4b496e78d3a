"""Query batches: a user's batch or loader, read once or several times, with its samples' ids."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from torch.utils.data import DataLoader

from tda_lightning.passes.batch_contents import batch_size, find_tensors
from tda_lightning.recording.collation import ReorderedSamplesError
from tda_lightning.recording.sample_ids import SampleLedger
from tda_lightning.results.progress import progress_bar

# Several passes over queries hold as many batches in memory at a time.
_MAX_GROUP_BYTES = 2**28


class Batches:
    """The batches of a loader, held in memory so that every pass over them is the same.

    Attributes:
        ids: Ids of each batch's samples, as :func:`identified` yields them.
    """

    def __init__(self, pairs: Iterable[tuple[Tensor | None, Any]]) -> None:
        self._pairs = list(pairs)
        self.ids = [ids for ids, _ in self._pairs]

    def __iter__(self) -> Iterator[Any]:
        """Yield copies, because a step may modify its batch in place."""
        return (copy.deepcopy(batch) for _, batch in self._pairs)


def batches_in_memory(queries: Any) -> Any:
    """Load the batches of a loader into memory: a shuffled loader changes its order every time."""
    return Batches(identified(queries)) if isinstance(queries, DataLoader) else queries


def groups_in_memory(queries: Any, *, progress: bool) -> Iterator[Any]:
    """Yield the batches of a loader in groups that are small enough to be held in memory.

    Samples without ids receive their positions in the whole loader.
    """
    if not isinstance(queries, DataLoader):
        yield queries
        return
    group: list[tuple[Tensor, Any]] = []
    n_bytes = n_samples = 0
    for ids, batch in identified(queries, progress=progress):
        n = batch_size(batch, "queries", ids)
        if ids is None or len(ids) != n:
            ids = torch.arange(n_samples, n_samples + n)
        group.append((ids, batch))
        n_samples += n
        n_bytes += sum(tensor.numel() * tensor.element_size() for tensor in find_tensors(batch))
        if n_bytes > _MAX_GROUP_BYTES:
            yield Batches(group)
            group, n_bytes = [], 0
    if group or not n_samples:
        yield Batches(group)


def identified(
    queries: Any, *, progress: bool = False
) -> Iterator[tuple[Int[Tensor, " n"] | None, Any]]:
    """Yield the batches of a loader, or the single batch, with the ids of their samples.

    Ids are those of training samples: indices into the dataset below any ``Subset``, also where the
    loader shuffles. They are ``None`` for a single batch, and where they cannot be inferred.
    """
    if isinstance(queries, Batches):
        yield from zip(queries.ids, queries, strict=True)
        return
    if not isinstance(queries, DataLoader):
        yield None, _copied(queries)
        return
    bar = progress_bar(queries, "queries", "batch", shown=progress)
    ledger, n_batches = SampleLedger(None), 0
    try:
        ledger.watch(queries, lambda: True)
    except ValueError:
        yield from ((None, batch) for batch in bar)
        return
    try:
        for batch in bar:
            n_batches += 1
            yield ledger.name(batch, n_batches - 1), batch
    except ReorderedSamplesError:
        if n_batches:
            raise
    finally:
        ledger.release()
    if not n_batches:  # The order of the samples is unknown, or there is no batch at all.
        yield from ((None, batch) for batch in queries)


def batches_of(queries: Any) -> Iterable[Any]:
    """Return the batches of a loader, or a copy of the single batch."""
    return queries if isinstance(queries, DataLoader | Batches) else [_copied(queries)]


def _copied(batch: Any) -> Any:
    """Return a copy of a user's batch, because a step may modify its batch in place."""
    try:
        return copy.deepcopy(batch)
    except (RuntimeError, TypeError):  # Such as results of a model, with their graph.
        return batch
