"""Tensors inside of whatever layers are called with and return: tuples, dicts, dataclasses."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor


def find_tensors(value: Any) -> Iterator[Tensor]:
    """Yield the tensors in a nest of sequences, mappings and dataclasses, in order."""
    if isinstance(value, Tensor):
        yield value
    else:
        for one in _parts(value):
            yield from find_tensors(one)


def _parts(value: Any) -> Iterable[Any]:
    if isinstance(value, list | tuple):
        return value
    if value is None or isinstance(value, str | int | float):  # `Mapping` below is slow to deny.
        return ()
    if isinstance(value, Mapping):
        return value.values()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return [getattr(value, field.name) for field in dataclasses.fields(value)]
    return ()
