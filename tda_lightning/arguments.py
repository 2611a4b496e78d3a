"""Arguments: what users pass is checked here, once, at the door, where Python does not check it.

A misspelt word must not select the other branch, nor a number out of its range give scores.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from numbers import Integral, Real
from typing import Any, get_args


def require_choices(given: object, choices: Mapping[str, Any]) -> None:
    """Raise unless attributes of an object are words out of their ``Literal`` types.

    Args:
        given: The object: a method with its hyper-parameters, say.
        choices: The ``Literal`` type of each attribute, by its name.

    Raises:
        ValueError: Naming the first that is not.
    """
    for name, literal in choices.items():
        require_choice(name, getattr(given, name), literal)


def require_choice(name: str, value: object, literal: Any) -> None:
    """Raise unless an argument is a word out of its ``Literal`` type.

    Args:
        name: Of the argument.
        value: What came.
        literal: The type, such as ``Literal["step", "epoch"]``.

    Raises:
        ValueError: Saying which there are.

    >>> from typing import Literal
    >>> require_choice("per", "batch", Literal["step", "epoch"])
    Traceback (most recent call last):
        ...
    ValueError: `per` is 'batch'; expected one of 'step', 'epoch'.
    """
    words = get_args(literal)
    if value not in words:
        raise ValueError(f"`{name}` is {value!r}; expected one of {', '.join(map(repr, words))}.")


def require_whole(name: str, value: object, *, least: int) -> None:
    """Raise unless an argument is a whole number that is large enough.

    >>> require_whole("k", 0, least=1)
    Traceback (most recent call last):
        ...
    ValueError: `k` is 0; expected a whole number of 1 or more.
    """
    if not isinstance(value, Integral) or isinstance(value, bool) or value < least:
        raise ValueError(f"`{name}` is {value!r}; expected a whole number of {least} or more.")


def require_positive(name: str, value: object) -> None:
    """Raise unless an argument is a finite number above zero.

    >>> require_positive("limit", -1.0)
    Traceback (most recent call last):
        ...
    ValueError: `limit` is -1.0; expected a finite number above 0.
    """
    if not _finite(value) > 0:
        raise ValueError(f"`{name}` is {value!r}; expected a finite number above 0.")


def require_limit(name: str, value: object) -> None:
    """Raise unless an argument is a number above zero, or infinity for no limit.

    >>> require_limit("max_gb", 0)
    Traceback (most recent call last):
        ...
    ValueError: `max_gb` is 0; expected a number above 0.
    """
    if isinstance(value, bool) or not isinstance(value, Real) or not float(value) > 0:
        raise ValueError(f"`{name}` is {value!r}; expected a number above 0.")


def require_not_negative(name: str, value: object) -> None:
    """Raise unless an argument is a finite number of zero or more.

    >>> require_not_negative("damping", float("inf"))
    Traceback (most recent call last):
        ...
    ValueError: `damping` is inf; expected a finite number of 0 or more.
    """
    if not _finite(value) >= 0:
        raise ValueError(f"`{name}` is {value!r}; expected a finite number of 0 or more.")


def require_kind(name: str, value: object, kind: type, examples: str) -> None:
    """Raise unless an argument is an object of some kind: an object, not its class.

    Args:
        name: Of the argument.
        value: What came.
        kind: What it has to be.
        examples: What users could pass, as they would write it.

    >>> require_kind("method", "tracin", int, "`TracIn()`")
    Traceback (most recent call last):
        ...
    ValueError: `method` is 'tracin'; expected an object such as `TracIn()`.
    """
    if not isinstance(value, kind):
        raise ValueError(f"`{name}` is {value!r}; expected an object such as {examples}.")


def _finite(value: object) -> float:
    """Return a finite number, and what compares as false for anything else."""
    if isinstance(value, bool) or not isinstance(value, Real):
        return math.nan
    return float(value) if math.isfinite(value) else math.nan
