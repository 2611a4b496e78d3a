"""Collation: check that a loader's ``collate_fn`` leaves the samples in the order of their draws.

Ids are inferred from the sampler. A function that sorts its samples by length, as users of packed
sequences do, would give each row the id of another sample. It is recognised by a second call with
the samples in reverse: its rows come out in the same order, where they should be reversed too.
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
import random
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from types import FunctionType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, default_collate, default_convert

from tda_lightning.recording.origins.order import MixedSamplesError, are_elements, order_of_rows
from tda_lightning.recording.origins.tracker import OriginTracker

Collate = Callable[[Any], Any]

_REMEDY = (
    "Or put an id into each sample, and pass `sample_ids=`: a key of the batch, or a function from "
    "the batch to ids."
)


class ReorderedSamplesError(ValueError):
    """The rows of a batch are not in the order in which their samples were drawn."""


class CheckedCollate:
    """A ``collate_fn`` that checks, in its calls 1, 2, 4, 8 and so on, whether it keeps the order.

    Samples of the same length stay in order when they are sorted, so one batch may show nothing.
    It runs where the wrapped function does, in each worker; an error there reaches the training.
    """

    def __init__(self, collate: Collate) -> None:
        self.wrapped = collate
        self._calls = 0
        self._has_warned = False

    def __call__(self, samples: Any) -> Any:
        """Return the batch of the wrapped function.

        Raises:
            ReorderedSamplesError: If its rows are in another order than the samples, or if a sample
                is missing.
        """
        self._calls += 1
        is_checked = self._calls & (self._calls - 1) == 0 and isinstance(samples, list)
        if isinstance(samples, list) and any(sample is None for sample in samples):
            raise ReorderedSamplesError(
                "The dataset returned None for a sample, which `collate_fn` drops or replaces, so "
                "the sampler does not show whose row each row is; expected a sample for each "
                "index. Leave such indices out before training: `Subset(dataset, indices)`. "
                f"{_REMEDY}"
            )
        if not is_checked or len(samples) < 2:
            return self.wrapped(samples)
        copies = _copied(samples)  # The function may modify its samples.
        batch, is_reordered = self._followed(samples)
        if is_reordered is None and copies is not None:
            is_reordered = _reorders(self.wrapped, copies, batch)
        if is_reordered:
            raise ReorderedSamplesError(
                "`collate_fn` changes the order of its samples, as sorting by length does, so the "
                "sampler does not show whose row each row is; expected the order of the list that "
                "it is given. Do not sort: `pack_padded_sequence(..., enforce_sorted=False)` needs "
                f"no order. {_REMEDY}"
            )
        return batch

    def _followed(self, samples: list[Any]) -> tuple[Any, bool | None]:
        """Return a batch, and whether its rows are samples in another order, if that is certain.

        Warns of rows that hold several samples.
        """
        tracker, n = OriginTracker((), len(samples)), len(samples)
        for number, sample in enumerate(samples):
            tracker.follow(_tensors(sample), number)
        with tracker:
            batch = self.wrapped(samples)
        origins = map(tracker.origins_of, tensors_of_samples(batch, n))
        known = [each for each in origins if each is not None]
        try:
            if not torch.equal(order_of_rows(known, n), torch.arange(n)):
                return batch, True
            # Elements of samples, joined; there are as many as samples by chance.
            return batch, False if any(are_elements(each, n) for each in known) else None
        except MixedSamplesError:
            self._warn_of_mixing()
        except RuntimeError:  # Tensors of an unusual kind must not end the training.
            pass
        return batch, None

    def _warn_of_mixing(self) -> None:
        if not self._has_warned:
            self._has_warned = True
            warnings.warn(
                "`collate_fn` puts two samples into a row, as mixup and CutMix do. Each row has "
                "the id of one of them; expected one sample per row. Return both as two rows, with "
                "their ids and weights: see `Mixup and CutMix` in docs/gotchas.md.",
                stacklevel=3,
            )

    def __getattr__(self, name: str) -> Any:
        """Look up every other attribute on the wrapped function."""
        if name.startswith("__") or name == "wrapped":
            raise AttributeError(name)
        return getattr(self.wrapped, name)


def check_collation(loader: DataLoader[Any]) -> Callable[[], None]:
    """Let a loader check its ``collate_fn``, and return a function that undoes it."""
    collate = loader.collate_fn
    if collate in (default_collate, default_convert) or isinstance(collate, CheckedCollate):
        return lambda: None
    checked = CheckedCollate(collate)
    loader.collate_fn = checked

    def undo() -> None:
        if loader.collate_fn is checked:
            loader.collate_fn = collate

    return undo


def _copied(samples: list[Any]) -> list[Any] | None:
    try:
        return copy.deepcopy(samples)
    except Exception:  # Open files and the like; such samples are not checked.
        return None


def _reorders(collate: Collate, samples: list[Any], batch: Any) -> bool:
    """Return whether a function puts samples into another order than they are given in."""
    try:
        with _undisturbed(collate):
            reversed_batch = collate(samples[::-1])
    except Exception:  # Its first call succeeded, so it depends on what happened before.
        return False
    rows, others = _rows(batch, len(samples)), _rows(reversed_batch, len(samples))
    # Other rows than before depend on random numbers or on the order; they show nothing.
    return others != rows[::-1] and sorted(others) == sorted(rows)


def _rows(batch: Any, n: int) -> list[tuple[bytes, ...]]:
    """Return the contents of each row of all tensors with ``n`` rows."""
    raw = [each.detach().cpu().contiguous() for each in tensors_of_samples(batch, n)]
    return [tuple(_bytes_of(each[i]) for each in raw) for i in range(n)]


def _bytes_of(row: Tensor) -> bytes:
    return row.reshape(-1).view(torch.uint8).numpy().tobytes()


def tensors_of_samples(value: Any, n: int) -> Iterator[Tensor]:
    """Yield the tensors of a batch whose ``n`` rows are its samples.

    A list of ``n`` entries that are no such tensors has an entry for each sample. One of those may
    have ``n`` rows too, such as the boxes in an image.
    """
    if isinstance(value, Tensor):
        if value.ndim and len(value) == n:
            yield value
        return
    parts = _parts(value)
    is_of_samples = isinstance(value, list | tuple) and len(parts) == n > 1
    if not is_of_samples or all(isinstance(p, Tensor) and p.shape[:1] == (n,) for p in parts):
        for part in parts:
            yield from tensors_of_samples(part, n)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    else:
        for part in _parts(value):
            yield from _tensors(part)


def _parts(value: Any) -> Sequence[Any]:
    """Return the entries of a list, a mapping or a dataclass."""
    if isinstance(value, Mapping):
        return list(value.values())
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return [getattr(value, field.name) for field in dataclasses.fields(value)]
    return ()


@contextmanager
def _undisturbed(collate: Collate) -> Iterator[None]:
    """Restore random numbers and the attributes of a function's objects; mute its warnings."""
    objects = [each for each in _variables(collate) if hasattr(each, "__dict__")]
    attributes = [(vars(each), dict(vars(each))) for each in objects]
    values = [value for _, content in attributes for value in content.values()]
    restorers = list(_restorers([*_variables(collate), *values]))
    python_state, numpy_state = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
        for restore in restorers:
            restore()
        for current, original in attributes:
            current.update(original)


def _variables(collate: Any) -> list[Any]:
    """Return the objects that a function uses: its own, arguments, and variables around it."""
    if isinstance(collate, partial):
        return [*collate.args, *collate.keywords.values(), *_variables(collate.func)]
    if not inspect.isfunction(collate):
        return [getattr(collate, "__self__", collate)]
    try:
        outer = inspect.getclosurevars(collate)
    except ValueError:  # A variable that is not set yet.
        return []
    values = [*outer.nonlocals.values(), *outer.globals.values()]
    return [each for each in values if not isinstance(each, type | ModuleType | FunctionType)]


def _restorers(values: Iterable[Any]) -> Iterator[Callable[[], None]]:
    """Yield a function for each generator of random numbers that restores its state."""
    for value in values:
        if isinstance(value, torch.Generator):
            yield partial(value.set_state, value.get_state())  # type: ignore[misc]
        elif isinstance(value, np.random.RandomState):
            yield partial(value.set_state, value.get_state())
        elif isinstance(value, random.Random):
            yield partial(value.setstate, value.getstate())
        elif isinstance(value, np.random.Generator):
            yield partial(setattr, value.bit_generator, "state", value.bit_generator.state)
