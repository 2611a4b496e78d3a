"""Check a recipe that was read from a file, field by field."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tda_lightning.stores.recipe import Block

Check = Callable[[Any], bool]
# More would only fill the memory.
_MAX_RANKS = 2**14
_MAX_SAMPLES = 2**34


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_whole(value: Any, least: int = 1) -> bool:
    return _is_integer(value) and value >= least


def _is_text(value: Any) -> bool:
    """Return whether this is a text without control characters, which might fool a terminal."""
    return isinstance(value, str) and not any(unicodedata.category(c) == "Cc" for c in value)


def _are_texts(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(map(_is_text, value))


def _maps_texts_to(check: Check) -> Check:
    return lambda value: (
        isinstance(value, Mapping) and all(map(_is_text, value)) and all(map(check, value.values()))
    )


def _one_of(*choices: str) -> Check:
    return lambda value: isinstance(value, str) and value in choices


def _records_of(**fields: Check) -> Check:
    def is_record(value: Any) -> bool:
        is_complete = isinstance(value, Mapping) and set(value) == set(fields)
        return is_complete and all(check(value[name]) for name, check in fields.items())

    return lambda value: isinstance(value, list | tuple) and all(map(is_record, value))


def _are_ranges(value: Any) -> bool:
    """Return whether these are half-open ranges that rise and do not overlap, or ``None``."""
    if value is None or not isinstance(value, list | tuple):
        return value is None
    pairs = [tuple(pair) if isinstance(pair, list | tuple) else () for pair in value]
    if not all(len(pair) == 2 and all(map(_is_id, pair)) for pair in pairs):
        return False
    ends = [end for pair in pairs for end in pair]
    is_rising = all(a <= b for a, b in pairwise(ends)) and all(a < b for a, b in pairs)
    return is_rising and sum(b - a for a, b in pairs) <= _MAX_SAMPLES


def _is_id(value: Any) -> bool:
    return _is_integer(value) and abs(value) <= 2**63


def _are_widths(value: Any) -> bool:
    is_list = isinstance(value, list | tuple)
    return value is None or (is_list and all(_is_whole(width, 0) for width in value))


_BLOCKS = _records_of(
    name=_is_text,
    layer=_is_text,
    modules=_are_texts,
    parameters=_are_texts,
    rows=_is_whole,
    columns=_is_whole,
)
_LEFT_OUT = _records_of(
    name=_is_text, layer=_is_text, size=lambda value: _is_whole(value, 0), reason=_is_text
)
_CHECKS: Mapping[str, tuple[Check, str]] = {
    "blocks": (_BLOCKS, "a list of recorded layers"),
    "left_out": (_LEFT_OUT, "a list of layers"),
    "projector": (
        _maps_texts_to(lambda value: _is_text(value) or _is_whole(value, 0)),
        "a projector's name and arguments",
    ),
    "dimension": (_is_whole, "a whole number of 1 or more"),
    "dtype": (_one_of("float32", "float64"), "'float32' or 'float64'"),
    "reduction": (_one_of("mean", "sum"), "'mean' or 'sum'"),
    "batch_dims": (
        _maps_texts_to(lambda value: value == "flattened" or _is_integer(value)),
        "an axis or 'flattened' by layer name",
    ),
    "preconditioner": (_one_of("optimizer", "none"), "'optimizer' or 'none'"),
    "curvature": (_one_of("fisher", "none"), "'fisher' or 'none'"),
    "ranks": (
        lambda value: _is_whole(value) and value <= _MAX_RANKS,
        f"a whole number from 1 to {_MAX_RANKS:,}",
    ),
    "every_n_steps": (_is_whole, "a whole number of 1 or more"),
    "train_ids": (_are_ranges, f"rising ranges of at most {_MAX_SAMPLES:,} ids, or null"),
    "model": (_is_text, "a name"),
    "versions": (_maps_texts_to(_is_text), "version numbers by name"),
    "widths": (_are_widths, "a list of whole numbers, or null"),
    "normalized": (_are_texts, "a list of names"),
    "is_training": (lambda value: isinstance(value, bool), "true or false"),
}
_OPTIONAL = {"widths", "is_training", "normalized"}  # Runs of older versions lack them.


def require_recipe(data: Any) -> None:
    """Check the fields of a recipe.

    Raises:
        ValueError: If a field is missing, unknown or invalid; the message names it.

    >>> require_recipe({"dimension": 3})
    Traceback (most recent call last):
        ...
    ValueError: `blocks` is missing
    """
    if not isinstance(data, Mapping):
        raise ValueError(f"the recipe is a {type(data).__name__}; expected its fields by name")
    for name, (is_valid, expected) in _CHECKS.items():
        if name not in data:
            if name not in _OPTIONAL:
                raise ValueError(f"`{name}` is missing")
        elif not is_valid(data[name]):
            raise ValueError(f"`{name}` is {shorten(data[name])}; expected {expected}")
    unknown = sorted(map(str, set(data) - set(_CHECKS)))
    if unknown:
        raise ValueError(f"`{unknown[0]}` is unknown; a newer version may have written it")
    _require_columns(data)


def _require_columns(data: Mapping[str, Any]) -> None:
    """Check that the columns of a row are those of the blocks."""
    widths, blocks, dimension = data.get("widths"), data["blocks"], data["dimension"]
    if widths is not None and (len(widths) != len(blocks) or sum(widths) != dimension):
        raise ValueError(
            f"`widths` is {shorten(widths)}; expected {len(blocks)} numbers that sum to "
            f"{dimension}, one for each block"
        )
    if "name" not in data["projector"]:
        raise ValueError("`projector` has no name; expected one")


def shorten(value: Any) -> str:
    """Return the ``repr`` of a value, or its beginning."""
    shown = repr(value)
    return shown if len(shown) <= 60 else f"{shown[:57]}..."


def block_differences(recorded: Sequence[Block], blocks: Sequence[Block]) -> list[str]:
    """Return in what the blocks of a model differ from the recorded ones."""
    ours = {block.name: block for block in recorded}
    theirs = {block.name: block for block in blocks}
    missing = [f"`{name}` is missing" for name in ours if name not in theirs]
    added = [f"`{name}` is new" for name in theirs if name not in ours]
    changed = [
        f"`{name}` was recorded as {_shape(ours[name])} and is now {_shape(theirs[name])}"
        for name in ours
        if name in theirs and ours[name] != theirs[name]
    ]
    return missing + added + changed


def _shape(block: Block) -> str:
    return f"{block.layer} of {block.rows} x {block.columns}"
