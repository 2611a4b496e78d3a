"""Which dataset index each row of a batch is, without touching the dataset.

A loader's sampler is wrapped so that it remembers what it hands out, lazily, as it is drawn.
Batches arrive in the order in which they were drawn, whatever the number of workers, so the oldest
draw not yet claimed belongs to the batch that has just arrived. No random number is consumed, no
iterator is started, and the loader gets its own sampler back at the end.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, Subset

IdSource = str | Callable[[Any], Any]

_REMEDY = (
    "Pass `sample_ids=`: a key of the batch that holds each sample's id, or a function from the "
    "batch to ids."
)


class RememberingSampler:
    """A sampler that remembers what it hands out; in all else the sampler that it wraps.

    Args:
        sampler: A sampler of indices or of lists of indices.
        is_recording: Asked at the start of every pass; passes of other loops leave no trace.
    """

    def __init__(self, sampler: Iterable[Any], is_recording: Callable[[], bool]) -> None:
        self.wrapped = sampler
        self._is_recording = is_recording
        self._drawn: deque[Any] = deque()

    def __iter__(self) -> Iterator[Any]:
        """Yield what the wrapped sampler yields, and remember it."""
        # A generator: nothing below runs before the first draw, just as in torch's own samplers, so
        # an iterator that is made and dropped (workers do that) neither draws nor resets anything.
        if not self._is_recording():
            yield from self.wrapped
            return
        drawn = self._drawn = deque()
        for item in self.wrapped:
            drawn.append(item)
            yield item

    def __len__(self) -> int:
        """Return the length of the wrapped sampler."""
        return len(self.wrapped)  # type: ignore[arg-type]

    def __getattr__(self, name: str) -> Any:
        """Pass every other question on to the wrapped sampler."""
        if name.startswith("__") or name == "wrapped":
            raise AttributeError(name)
        return getattr(self.wrapped, name)

    def claim(self) -> list[int]:
        """Take the oldest draw that no batch has claimed yet."""
        if not self._drawn:
            raise RuntimeError(f"A batch arrived that no sampler drew. {_REMEDY}")
        item = self._drawn.popleft()
        return list(item) if isinstance(item, Iterable) else [item]


class SampleLedger:
    """Names the samples of each training batch.

    Args:
        source: Where ids stand in a batch, or ``None`` to learn them from the sampler.
    """

    def __init__(self, source: IdSource | None) -> None:
        self._source = source
        self._sampler: RememberingSampler | None = None
        self._restore: Callable[[], None] | None = None
        self._ids: Int[np.ndarray, " n_train"] | None = None
        self._loader: object = None
        # Place of the last batch in its epoch; unknown before the first after a resumption.
        self._last_batch: int | None = -1

    @property
    def train_ids(self) -> Int[np.ndarray, " n_train"] | None:
        """Ids of the whole training set, sorted, or ``None`` if only the batches know."""
        return None if self._ids is None else np.unique(self._ids)

    def watch(self, loader: object, is_recording: Callable[[], bool]) -> None:
        """Learn ids from this loader from now on; until :meth:`release`, its sampler is wrapped.

        Raises:
            ValueError: If the ids of this loader's batches cannot be known.
        """
        if self._source is not None:
            return
        self.release()
        checked = _require_known_order(loader)
        attribute = "sampler" if checked.batch_sampler is None else "batch_sampler"
        sampler = RememberingSampler(getattr(checked, attribute), is_recording)
        self._ids, self._loader = root_ids(checked.dataset), checked
        # The loader guards these attributes against assignment, hence `object.__setattr__`.
        object.__setattr__(checked, attribute, sampler)
        self._sampler, self._restore = sampler, partial(_unwrap, checked, attribute, sampler)

    def release(self) -> None:
        """Give the watched loader its own sampler back."""
        if self._restore is not None:
            self._restore()
            self._restore = self._sampler = self._loader = None

    def name(self, batch: Any, batch_index: int) -> Int[Tensor, " n"]:
        """Return the sample ids of a batch that has just arrived.

        Args:
            batch: The batch.
            batch_index: Its place in the epoch; batches in between that were dropped are skipped.
        """
        if self._source is not None:
            return _as_ids(_look_up(batch, self._source))
        if self._sampler is None:
            raise RuntimeError(f"No training loader was seen before the first batch. {_REMEDY}")
        if self._last_batch is None:
            self._require_fresh_order(batch_index)
            self._last_batch = batch_index - 1
        for _ in range(batch_index - self._last_batch - 1):
            self._sampler.claim()
        self._last_batch = batch_index
        drawn = self._sampler.claim()
        return torch.as_tensor(drawn if self._ids is None else self._ids[drawn])

    def start_training(self, steps: int) -> None:
        """Expect batch 0 next, or any: training may be resumed in the middle of an epoch.

        Args:
            steps: Number of steps that were taken before.
        """
        self._last_batch = None if steps else -1

    def start_epoch(self) -> None:
        """Expect batch 0 next, unless that is still to be seen."""
        if self._last_batch is not None:
            self._last_batch = -1

    def _require_fresh_order(self, batch_index: int) -> None:
        if batch_index and hasattr(self._loader, "load_state_dict"):
            raise ValueError(
                f"Cannot tell which samples the `{type(self._loader).__name__}` yields: it was "
                f"resumed at batch {batch_index} by a state of its own, so it may have drawn "
                f"samples that it never delivered. {_REMEDY}"
            )


def root_ids(dataset: Any) -> Int[np.ndarray, " n"] | None:
    """Return, for every index of ``dataset``, the index in the dataset below all ``Subset``s.

    Returns:
        Root indices, or ``None`` if the dataset has no length.
    """
    if isinstance(dataset, Subset):
        below = root_ids(dataset.dataset)
        indices = np.asarray(dataset.indices, dtype=np.int64)
        return indices if below is None else below[indices]
    return np.arange(len(dataset)) if hasattr(dataset, "__len__") else None


def require_once(ids: Int[Tensor, " n"]) -> None:
    """Raise unless a pass over the training data has drawn every sample once.

    Raises:
        ValueError: Naming a sample that came again.
    """
    values, counts = np.unique(ids.numpy(), return_counts=True)
    if (counts > 1).any():
        raise ValueError(
            f"`train_loader` draws sample {values[counts.argmax()]} {counts.max()} times in one "
            "pass; expected every sample once. Pass a loader without a sampler that repeats."
        )


def _require_known_order(loader: object) -> DataLoader[Any]:
    if not isinstance(loader, DataLoader):
        raise ValueError(
            f"Cannot tell which samples a `{type(loader).__name__}` yields; expected a "
            f"`torch.utils.data.DataLoader`. {_REMEDY}"
        )
    if isinstance(loader.dataset, IterableDataset):
        raise ValueError(
            f"`{type(loader.dataset).__name__}` is an iterable dataset, whose samples have no "
            f"index; expected a dataset with `__getitem__`. {_REMEDY}"
        )
    if not getattr(loader, "in_order", True):
        raise ValueError(
            "The training loader has `in_order=False`, so batches arrive in another order than "
            f"they were drawn in; expected `in_order=True`. Set it, or: {_REMEDY}"
        )
    return loader


def _unwrap(loader: DataLoader[Any], attribute: str, sampler: RememberingSampler) -> None:
    """Take one sampler out of a loader, whatever others have been wrapped around it since."""
    outer = getattr(loader, attribute)
    if outer is sampler:
        object.__setattr__(loader, attribute, sampler.wrapped)
        return
    while isinstance(outer, RememberingSampler):
        if outer.wrapped is sampler:
            outer.wrapped = sampler.wrapped
            return
        outer = outer.wrapped


def _look_up(batch: Any, source: IdSource) -> Any:
    if callable(source):
        return source(batch)
    if isinstance(batch, Mapping) and source in batch:
        return batch[source]
    keys = list(batch) if isinstance(batch, Mapping) else f"a {type(batch).__name__}"
    raise ValueError(
        f"`sample_ids={source!r}` is no key of the batch, which has {keys}. Name a key that holds "
        "each sample's id, or pass a function from the batch to ids."
    )


def _as_ids(found: Any) -> Int[Tensor, " n"]:
    is_sequence = isinstance(found, Sequence | np.ndarray | Tensor)
    ids = torch.as_tensor(found).cpu() if is_sequence else torch.empty(0)
    if ids.ndim != 1 or ids.is_floating_point() or len(ids) == 0 or ids.dtype == torch.bool:
        shape = tuple(ids.shape) if is_sequence else type(found).__name__
        raise ValueError(
            f"`sample_ids` gave {shape} of {ids.dtype}; expected one integer per sample of the "
            "batch. Number your samples, and give those numbers."
        )
    return ids.to(torch.int64)
