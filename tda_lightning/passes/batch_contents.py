"""What a batch holds: its tensors, wherever they are nested, and the number of its samples."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sized
from typing import Any

from torch import Tensor

from tda_lightning.stores.arguments import describe

# What batches of graphs, and of nested tensors, call the number of their samples.
_SIZE_ATTRIBUTES = ("num_graphs", "batch_size")


def require_batches(batches: object, argument: str) -> None:
    """Check that a user's loader, of which ``batches`` were kept, was not empty."""
    if not batches:
        raise ValueError(f"`{argument}` is an empty loader; expected at least one batch.")


def find_tensors(value: Any) -> Iterator[Tensor]:
    """Yield the tensors in nested lists, tuples, mappings and dataclasses, in order."""
    if isinstance(value, Tensor):
        yield value
    else:
        for part in _parts(value):
            yield from find_tensors(part)


def _parts(value: Any) -> Iterable[Any]:
    if isinstance(value, list | tuple):
        return value
    if value is None or isinstance(value, str | int | float):  # Skips the slow check below.
        return ()
    if isinstance(value, Mapping):
        return value.values()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return [getattr(value, field.name) for field in dataclasses.fields(value)]
    return ()


def batch_size(batch: Any, argument: str, ids: Sized | None = None) -> int:
    """Return the number of samples in a batch that comes from a user's argument.

    It is the length of the batch's parts: of a tensor, of a list, or of the tensors in a list. A
    batch may also be a list of samples. If the parts differ, or have elements of several samples,
    the ids count, where they are known.

    Raises:
        ValueError: If it holds no tensor with an axis of samples, or if the number is not clear.
    """
    if _is_list_of_samples(batch):
        return len(batch)
    parts = [lengths for lengths in map(_lengths, _top(batch)) if lengths]
    if not parts:
        raise ValueError(
            f"`{argument}` holds no tensor with samples along its first axis: got "
            f"{describe(batch)}; expected a batch as the training loader yields it, or a "
            "`DataLoader` of such batches."
        )
    common = [n for n in parts[0] if all(n in lengths for lengths in parts[1:])]
    if not common and ids is None:
        raise ValueError(
            f"The parts of `{argument}` differ in length, so the number of samples is not clear: "
            f"got {describe(batch)}. Pass a `DataLoader` of such batches, whose sampler shows it."
        )
    n = common[0] if common else 0
    # With a single id, the item of a dataset may be a batch.
    if ids is not None and (not common or (len(ids) > 1 and len(ids) not in common)):
        n = len(ids)
    if n == 0:
        raise ValueError(f"`{argument}` is an empty batch; expected at least one sample.")
    return n


def part_of(batch: Any, n: int, key: int | slice) -> Any:
    """Return one of a batch's ``n`` samples, or a slice of them, in a batch of the same kind.

    Tensors with ``n`` rows are cut, and lists of ``n`` samples; the rest is kept.
    """
    is_list = _is_list_of_samples(batch) or _is_without_tensors(batch)
    return batch[key] if is_list and len(batch) == n else _with_parts(batch, n, key)


def _with_parts(batch: Any, n: int, key: int | slice) -> Any:
    if isinstance(batch, Mapping):
        part = copy.copy(batch) if hasattr(batch, "__setitem__") else dict(batch)
        for name, value in batch.items():
            part[name] = _cut(value, n, key)
        return part
    if isinstance(batch, list | tuple):
        parts = [_cut(value, n, key) for value in batch]
        return type(batch)(*parts) if hasattr(batch, "_fields") else type(batch)(parts)
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        names = [field.name for field in dataclasses.fields(batch) if field.init]
        fields = {name: _cut(getattr(batch, name), n, key) for name in names}
        return dataclasses.replace(batch, **fields)
    return _cut(batch, n, key)


def _cut(part: Any, n: int, key: int | slice) -> Any:
    """Cut a part of a batch, as :func:`part_of` cuts the batch."""
    if isinstance(part, Tensor):
        return part[key] if part.ndim and len(part) == n else part
    if isinstance(part, list | tuple) and len(part) == n and _has_an_entry_per_sample(part):
        return part[key]
    return _with_parts(part, n, key) if _parts(part) else part


def _has_an_entry_per_sample(part: list[Any] | tuple[Any, ...]) -> bool:
    """Return whether a list of ``n`` entries, within a batch of ``n`` samples, has one for each.

    Otherwise its entries are tensors with ``n`` rows, such as views.
    """
    if _is_without_tensors(part):
        return True
    have_rows = all(tensor.ndim and len(tensor) == len(part) for tensor in find_tensors(part))
    kinds = {(type(entry), entry.ndim if isinstance(entry, Tensor) else None) for entry in part}
    return not have_rows and len(kinds) == 1


def _is_without_tensors(batch: Any) -> bool:
    return isinstance(batch, list | tuple) and next(find_tensors(batch), None) is None


def _is_list_of_samples(batch: Any) -> bool:
    """Return whether each entry is a sample.

    It is a tuple such as an image and the dictionary of its objects, or a tuple or a mapping with a
    number.
    """
    if not isinstance(batch, list) or not batch:
        return False
    if all(isinstance(sample, Mapping) for sample in batch):
        return all(any(map(_is_number, sample.values())) for sample in batch)
    if not all(isinstance(sample, tuple) for sample in batch):
        return False
    if all(any(map(_is_number, sample)) for sample in batch):
        return True
    kinds = {tuple(map(type, sample)) for sample in batch}
    return len(kinds) == 1 and len(set(kinds.pop())) > 1


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) or (isinstance(value, Tensor) and not value.ndim)


def _top(batch: Any) -> Iterable[Any]:
    return [batch] if isinstance(batch, Tensor) or _declared(batch) else _parts(batch)


def _declared(value: Any) -> int | None:
    """Return the number of samples that an object states, as batches of graphs do."""
    if isinstance(value, Tensor):
        return None
    for name in _SIZE_ATTRIBUTES:
        size = getattr(value, name, None)
        size = size[0] if isinstance(size, tuple) and size else size
        if isinstance(size, int) and size > 0:
            return size
    return None


def _lengths(part: Any) -> list[int]:
    """Return the numbers of samples that a part of a batch can have, the likelier ones first."""
    declared = _declared(part)
    if declared is not None:
        return [declared]
    if isinstance(part, Tensor):
        return [len(part)] if part.ndim else []
    inner = {len(tensor) for tensor in find_tensors(part) if tensor.ndim}
    lengths = [*inner] if len(inner) == 1 else []
    if isinstance(part, list | tuple) and not _is_without_tensors(part):
        lengths.append(len(part))
    return lengths
