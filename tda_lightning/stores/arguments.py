"""Check user arguments once, before any work begins, and describe them in error messages.

A misspelt option must not select another branch, and a number out of range must not yield scores.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from functools import wraps
from inspect import signature
from numbers import Integral, Real
from pathlib import Path
from typing import Any, ParamSpec, TypeVar, get_args

from torch import Tensor

# Longer values are described, in place of their `repr`, in error messages.
MAX_SHOWN = 100

P = ParamSpec("P")
R = TypeVar("R")


def require_choice(name: str, value: object, literal: Any) -> None:
    """Check that an argument is a value of its ``Literal`` type.

    >>> from typing import Literal
    >>> require_choice("per", "batch", Literal["step", "epoch"])
    Traceback (most recent call last):
        ...
    ValueError: `per` is 'batch'; expected one of 'step', 'epoch'.
    """
    choices = get_args(literal)
    if value not in choices:
        raise ValueError(f"`{name}` is {value!r}; expected one of {', '.join(map(repr, choices))}.")


def require_whole(name: str, value: object, *, least: int) -> None:
    """Check that an argument is a whole number of at least ``least``.

    >>> require_whole("k", 0, least=1)
    Traceback (most recent call last):
        ...
    ValueError: `k` is 0; expected a whole number of 1 or more.
    """
    if not isinstance(value, Integral) or isinstance(value, bool) or value < least:
        raise ValueError(f"`{name}` is {value!r}; expected a whole number of {least} or more.")


def require_positive(name: str, value: object) -> None:
    """Check that an argument is a finite number above zero.

    >>> require_positive("limit", -1.0)
    Traceback (most recent call last):
        ...
    ValueError: `limit` is -1.0; expected a finite number above 0.
    """
    if not _finite(value) > 0:
        raise ValueError(f"`{name}` is {value!r}; expected a finite number above 0.")


def require_limit(name: str, value: object) -> None:
    """Check that an argument is a number above zero; infinity means no limit.

    >>> require_limit("max_gb", 0)
    Traceback (most recent call last):
        ...
    ValueError: `max_gb` is 0; expected a number above 0.
    """
    if isinstance(value, bool) or not isinstance(value, Real) or not float(value) > 0:
        raise ValueError(f"`{name}` is {value!r}; expected a number above 0.")


def require_not_negative(name: str, value: object) -> None:
    """Check that an argument is a finite number of zero or more.

    >>> require_not_negative("damping", float("inf"))
    Traceback (most recent call last):
        ...
    ValueError: `damping` is inf; expected a finite number of 0 or more.
    """
    if not _finite(value) >= 0:
        raise ValueError(f"`{name}` is {value!r}; expected a finite number of 0 or more.")


def require_kind(name: str, value: object, kind: type, examples: str) -> None:
    """Check that an argument is an instance of a class, and not the class.

    >>> require_kind("method", "tracin", int, "`TracIn()`")
    Traceback (most recent call last):
        ...
    ValueError: `method` is 'tracin'; expected an object such as `TracIn()`.
    """
    if isinstance(value, type):
        raise ValueError(
            f"`{name}` is the class `{value.__name__}`; expected an object such as {examples}. "
            f"Call the class: `{value.__name__}()`."
        )
    if not isinstance(value, kind):
        shown = repr(value)
        if len(shown) > MAX_SHOWN:
            shown = describe(value)
        raise ValueError(f"`{name}` is {shown}; expected an object such as {examples}.")


def require_object(name: str, value: object) -> None:
    """Check that an argument is not a class, as in ``method=TracIn``.

    >>> require_object("method", dict)
    Traceback (most recent call last):
        ...
    ValueError: `method` is the class `dict`; expected an object of it. Call it: `dict()`.
    """
    if isinstance(value, type):
        raise ValueError(
            f"`{name}` is the class `{value.__name__}`; expected an object of it. Call it: "
            f"`{value.__name__}()`."
        )


def absolute_path(path: str | os.PathLike[str]) -> Path:
    """Return a path that no later change of the working directory affects; ``~`` is expanded.

    Raises:
        ValueError: If the operating system cannot have a file of that name.
    """
    try:
        is_possible = b"\0" not in os.fsencode(path)
    except UnicodeEncodeError:
        is_possible = False
    if not is_possible:
        raise ValueError(
            f"The path {os.fspath(path)!r} has characters that no file can have here, where names "
            f"are in {sys.getfilesystemencoding()}; expected others. Rename it; or set a UTF-8 "
            "locale, such as `LC_ALL=C.UTF-8`."
        )
    # Unlike `Path.expanduser`, this leaves the name of an unknown user as it is.
    return Path(os.path.expanduser(path)).absolute()


def call_like(example: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Decorate a function: if its arguments do not fit, the error shows how it is called.

    >>> @call_like("`double(3)`")
    ... def double(number: int) -> int:
    ...     return 2 * number
    >>> double(3, 5)
    Traceback (most recent call last):
        ...
    TypeError: `double`: too many positional arguments. Call it like `double(3)`.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        @wraps(function)
        def checked(*args: P.args, **kwargs: P.kwargs) -> R:
            try:
                signature(function).bind(*args, **kwargs)
            except TypeError as error:
                raise TypeError(
                    f"`{function.__qualname__}`: {error}. Call it like {example}."
                ) from None
            return function(*args, **kwargs)

        return checked

    return decorate


def is_selected(names: Iterable[str], patterns: Sequence[str]) -> bool:
    """Return whether patterns select a layer by one of its names.

    A pattern may hold ``*`` for any characters. One that begins with ``!`` excludes, whatever the
    others select; if all exclude, everything else is selected.

    >>> is_selected(["encoder.norm"], ["encoder.*", "!*.norm"])
    False
    >>> is_selected(["head"], ["!*.norm"])
    True
    """
    wanted = [pattern for pattern in patterns if not pattern.startswith("!")]
    unwanted = [pattern[1:] for pattern in patterns if pattern.startswith("!")]
    names = list(names)
    return _matches(names, wanted or ["*"]) and not _matches(names, unwanted)


def unmatched(names: Iterable[str], patterns: Sequence[str]) -> list[str]:
    """Return the patterns, without their ``!``, that match no name."""
    names = list(names)
    return [bare for p in patterns if not _matches(names, [bare := p.removeprefix("!")])]


def _matches(names: Sequence[str], patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns for name in names)


def describe(value: Any) -> str:
    """Describe a value in a few words, for error messages.

    >>> import torch
    >>> describe({"x": torch.zeros(3, 5), "names": ["a"]})
    "{'x': a tensor of shape (3, 5) (torch.float32), 'names': (a str)}"
    """
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)} ({value.dtype})"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key!r}: {describe(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "(" + ", ".join(describe(item) for item in value) + ")"
    return f"a {type(value).__name__}" if value is not None else "None"


def name_of(function: object) -> str:
    """Return the name of a function, or the ``repr`` of an object."""
    return getattr(function, "__name__", None) or repr(function)


def _finite(value: object) -> float:
    """Return a finite number as a float, else NaN, which fails every comparison."""
    if isinstance(value, bool) or not isinstance(value, Real):
        return math.nan
    return float(value) if math.isfinite(value) else math.nan
