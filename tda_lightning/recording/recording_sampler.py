"""RecordingSampler: stores the indices that a loader draws, without a change to their order."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

from torch.utils.data import DataLoader

REMEDY = (
    "Pass `sample_ids=`: a key of the batch that holds each sample's id, or a function from the "
    "batch to ids."
)


class RecordingSampler:
    """A sampler that stores the drawn indices, and otherwise behaves like the wrapped sampler.

    ``is_recording`` is called at the start of every pass; passes of other loops are not stored.
    """

    def __init__(self, sampler: Iterable[Any], is_recording: Callable[[], bool]) -> None:
        self.wrapped = sampler
        self._is_recording = is_recording
        self._drawn: deque[Any] = deque()

    def __iter__(self) -> Iterator[Any]:
        """Yield the items of the wrapped sampler, and store them."""
        # A generator: nothing below runs before the first draw, as in torch's own samplers. So an
        # iterator that is created and dropped (workers do that) neither draws nor resets anything.
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
        """Look up every other attribute on the wrapped sampler."""
        if name.startswith("__") or name == "wrapped":
            raise AttributeError(name)
        return getattr(self.wrapped, name)

    def claim(self) -> list[int]:
        """Remove and return the oldest draw that no batch has claimed yet."""
        if not self._drawn:
            raise RuntimeError(f"A batch arrived that the sampler has not drawn. {REMEDY}")
        item = self._drawn.popleft()
        return list(item) if isinstance(item, Iterable) else [item]


def watch_sampler(
    loader: DataLoader[Any], is_recording: Callable[[], bool]
) -> tuple[RecordingSampler, Callable[[], None]]:
    """Wrap the sampler of a loader; return the wrapper, and a function that removes it."""
    attribute = "sampler" if loader.batch_sampler is None else "batch_sampler"
    sampler = RecordingSampler(getattr(loader, attribute), is_recording)
    # The loader forbids assignment to these attributes, hence `object.__setattr__`.
    object.__setattr__(loader, attribute, sampler)
    return sampler, partial(_unwrap, loader, attribute, sampler)


def _unwrap(loader: DataLoader[Any], attribute: str, sampler: RecordingSampler) -> None:
    """Remove one wrapper from a loader's sampler, also from between other wrappers."""
    outer = getattr(loader, attribute)
    if outer is sampler:
        object.__setattr__(loader, attribute, sampler.wrapped)
        return
    while isinstance(outer, RecordingSampler):
        if outer.wrapped is sampler:
            outer.wrapped = sampler.wrapped
            return
        outer = outer.wrapped
