"""Optional dependencies: name the extra to install where a package is missing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pandas import DataFrame as DataFrame
    from pandas import Series as Series
else:  # Annotations need no import of pandas, which takes long and may be missing.
    DataFrame = Series = Any


@contextmanager
def needs(extra: str) -> Iterator[None]:
    """Name the extra of ``pyproject.toml`` to install if an import in this block fails.

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


def import_pandas() -> Any:
    """Return the module ``pandas``, or name the extra to install."""
    with needs("pandas"):
        import pandas
    return pandas
