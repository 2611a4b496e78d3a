"""Extras: packages that not everybody needs, and what to do where one is missing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def needs(extra: str) -> Iterator[None]:
    """Say which extra to install if an import in this block finds nothing.

    Args:
        extra: Its name in ``pyproject.toml``.

    Raises:
        ModuleNotFoundError: Naming the package and the command.

    >>> with needs("plots"):
    ...     import no_such_package
    Traceback (most recent call last):
        ...
    ModuleNotFoundError: `no_such_package` is not installed: pip install 'tda_lightning[plots]'
    """
    try:
        yield
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"`{error.name}` is not installed: pip install 'tda_lightning[{extra}]'",
            name=error.name,
        ) from error
