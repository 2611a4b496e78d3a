"""StoreFileError: one clear error for a file that is damaged, whatever the library below raises."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class StoreFileError(OSError):
    """A file of a run that cannot be used; the message names it."""


@contextmanager
def reading(
    path: Path, expected: str, remedy: str, kind: type[Exception] = StoreFileError
) -> Iterator[None]:
    """Turn every error inside the context into one that names the file.

    Args:
        path: The file that is read inside the context.
        expected: What it should be, for the message.
        remedy: What to do, for the message.
        kind: Class of the error.

    Raises:
        Exception: If anything goes wrong, of class ``kind``.

    >>> with reading(Path("run/recipe.json"), "a recipe", "Restore it from a copy."):
    ...     {}["format"]
    Traceback (most recent call last):
        ...
    tda_lightning.stores.damage.StoreFileError: `run/recipe.json` is damaged; expected a recipe. \
Reading it failed: KeyError: 'format'. Restore it from a copy.
    """
    try:
        _require_regular(path)
        yield
    except StoreFileError:
        raise
    except Exception as error:
        raise kind(
            f"`{printable(str(path))}` {_state_of(path)}; expected {expected}. Reading it failed: "
            f"{_in_short(error)}. {remedy}"
        ) from error


def _require_regular(path: Path) -> None:
    """Check that a path is a file, if it exists: a pipe or a device may never end."""
    if path.exists() and not path.is_file():
        raise ValueError("it is not a regular file")


def _state_of(path: Path) -> str:
    if path.is_dir():
        return "is a folder"
    if path.is_symlink() and not path.exists():
        return "is a link to nothing"
    return "is damaged"


def _in_short(error: Exception) -> str:
    """Return the first line of a library's message, with the name of the error."""
    first, *_ = str(error).splitlines() or [""]
    shown = first if len(first) <= 160 else f"{first[:157]}..."
    return f"{type(error).__name__}: {printable(shown)}".removesuffix(": ").removesuffix(".")


def printable(text: str) -> str:
    r"""Return a text with escaped control characters, which might fool a terminal.

    >>> printable("a\x1b[2J\nb")
    'a\\x1b[2J\\nb'
    """
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
