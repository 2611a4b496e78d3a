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


class SamplerPass:
    """One pass over a sampler, with the drawn items that no batch has claimed yet.

    Nothing is drawn before the first item is requested, as in torch's own samplers. So an iterator
    that is created and dropped (workers do that) neither draws nor resets anything.
    """

    def __init__(self, sampler: RecordingSampler) -> None:
        self.sampler = sampler
        self.drawn: deque[Any] = deque()
        self.wrapped: Iterator[Any] | None = None
        self._is_recorded = False

    def __iter__(self) -> Iterator[Any]:
        """Return this iterator."""
        return self

    def __next__(self) -> Any:
        """Return the next item, and store it."""
        if self.wrapped is None:
            self._is_recorded = self.sampler.begin(self)
            self.wrapped = iter(self.sampler.wrapped)
        item = next(self.wrapped)
        if self._is_recorded:
            self.drawn.append(item)
        return item


class RecordingSampler:
    """A sampler that stores the drawn indices, and otherwise behaves like the wrapped sampler.

    ``is_recording`` is called at the start of every pass; passes of other loops are not stored.
    """

    def __init__(self, sampler: Iterable[Any], is_recording: Callable[[], bool]) -> None:
        self.wrapped = sampler
        self._is_recording = is_recording
        self._latest = SamplerPass(self)

    def __iter__(self) -> Iterator[Any]:
        """Return a pass over the wrapped sampler that stores its items."""
        return SamplerPass(self)

    def begin(self, new: SamplerPass) -> bool:
        """Return whether a pass that begins now is to be stored."""
        is_recorded = self._is_recording()
        if is_recorded:
            self._latest = new
        return is_recorded

    def __len__(self) -> int:
        """Return the length of the wrapped sampler."""
        return len(self.wrapped)  # type: ignore[arg-type]

    def __getattr__(self, name: str) -> Any:
        """Look up every other attribute on the wrapped sampler."""
        if name.startswith("__") or name == "wrapped":
            raise AttributeError(name)
        return getattr(self.wrapped, name)

    def claim(self, outer: object = None) -> list[Any]:
        """Remove and return the oldest draw of a pass that no batch has claimed yet.

        Args:
            outer: The pass that the batch comes from, if it is known: other code may iterate the
                same loader meanwhile. Otherwise the latest one counts.
        """
        drawn = self._pass_in(outer).drawn
        if not drawn:
            raise RuntimeError(f"A batch arrived that the sampler has not drawn. {REMEDY}")
        item = drawn.popleft()
        return list(item) if isinstance(item, Iterable) else [item]

    def n_ahead(self, outer: object = None) -> int:
        """Return the number of draws that no batch has claimed yet."""
        return len(self._pass_in(outer).drawn)

    def _pass_in(self, outer: object) -> SamplerPass:
        """Return the pass of this sampler inside that of other wrappers."""
        while isinstance(outer, SamplerPass):
            if outer.sampler is self:
                return outer
            outer = outer.wrapped
        return self._latest


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
