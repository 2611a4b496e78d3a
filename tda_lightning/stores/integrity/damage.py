"""Damage: checksums that show it, and one clear error for a damaged file.

The checksums are XXH3, which is several times faster than reading the bytes.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

# Small enough to stay in a cache between reading and summing, and in memory that is reused.
_CHUNK_BYTES = 2**16

# Zeros take no room in a sparse copy, but a run does not consist of zeros.
_MAX_SPARSE_BYTES = 2**30
_MAX_SPARSENESS = 1000


def checksum_of(content: bytes | np.ndarray) -> int:
    """Return the XXH3 checksum, 64 bits, of bytes, or of the memory of a contiguous array."""
    data: Any = content  # The annotation of the library does not include arrays.
    return xxhash.xxh3_64_intdigest(data)


class Checksum:
    """The XXH3 checksum, 64 bits, of parts that are added one after the other."""

    def __init__(self) -> None:
        self._state = xxhash.xxh3_64()

    def add(self, part: memoryview) -> None:
        """Add the next part."""
        self._state.update(part)

    @property
    def value(self) -> int:
        """The checksum of all parts so far."""
        return self._state.intdigest()


def checksum_of_parts(parts: Iterable[memoryview]) -> int:
    """Return the checksum of concatenated parts."""
    checksum = Checksum()
    for part in parts:
        checksum.add(part)
    return checksum.value


def require_stored_bytes(path: Path) -> None:
    """Check that a large file is not almost empty: a sparse one may claim any size.

    Raises:
        ValueError: If it is.
    """
    status = path.stat()
    stored = 512 * getattr(status, "st_blocks", 0)  # Zero where the file system does not count.
    if stored and status.st_size > max(_MAX_SPARSE_BYTES, _MAX_SPARSENESS * stored):
        raise ValueError(f"it claims {status.st_size:,} bytes and stores {stored:,}")


def read_into(content: memoryview, file: FileIO) -> bool:
    """Fill memory from an open file; return whether the file was long enough."""
    start = 0
    while start < len(content):
        n_bytes = file.readinto(content[start:])
        if not n_bytes:
            return False
        start += n_bytes
    return True


def checksum_of_document(document: Mapping[str, Any]) -> str:
    """Return the checksum of a document: that of its JSON, with sorted keys and no spaces.

    >>> checksum_of_document({"b": 1, "a": 2}) == checksum_of_document({"a": 2, "b": 1})
    True
    """
    return f"{checksum_of(canonical_json(document)):016x}"


def canonical_json(document: Mapping[str, Any]) -> bytes:
    """Return the JSON of a document with sorted keys and no spaces."""
    return json.dumps(document, sort_keys=True, separators=(",", ":")).encode()


def checksum_of_file(
    path: Path, prefix: bytes = b"", spans: Sequence[tuple[int, int]] | None = None
) -> str:
    """Return the checksum of a prefix and of parts of a file.

    Args:
        path: The file.
        prefix: Bytes to sum before the file's.
        spans: First byte and end of each part, in order; by default the whole file.
    """
    state = xxhash.xxh3_64(prefix)
    chunk = memoryview(bytearray(_CHUNK_BYTES))
    with path.open("rb", buffering=0) as file:
        for start, stop in spans or [(0, path.stat().st_size)]:
            file.seek(start)
            while start < stop and (n := file.readinto(chunk[: min(len(chunk), stop - start)])):
                state.update(chunk[:n])
                start += n
    return state.hexdigest()


class StoreFileError(OSError):
    """A file of a run that cannot be used; the message names it."""


# Errors of the system that do not depend on the content of a file.
_NOT_OF_CONTENT = {
    *(errno.EACCES, errno.EPERM, errno.EMFILE, errno.ENFILE, errno.ESTALE, errno.EIO),
    errno.ENAMETOOLONG,
}


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Turn the system's errors of opening a file into one that names it.

    Raises:
        StoreFileError: If the file cannot be read, though it may be whole.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in _NOT_OF_CONTENT:
            raise
        raise StoreFileError(_cannot_be_read(path, error)) from error


@contextmanager
def reading(
    path: Path, expected: str, remedy: str, kind: type[Exception] = StoreFileError
) -> Iterator[None]:
    """Turn every error inside the context into one that names the file.

    Args:
        path: The file that is read inside the context.
        expected: The expected content, for the message.
        remedy: What to do, for the message.
        kind: Class of the error.

    Raises:
        Exception: If anything goes wrong, of class ``kind``.

    >>> with reading(Path("run/recipe.json"), "a recipe", "Restore it from a copy."):
    ...     {}["format"]
    Traceback (most recent call last):
        ...
    tda_lightning.stores.integrity.damage.StoreFileError: `run/recipe.json` is damaged; expected a \
recipe. Reading it failed: KeyError: 'format'. Restore it from a copy.
    """
    try:
        _require_regular(path)
        yield
    except StoreFileError:
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno in _NOT_OF_CONTENT:
            raise kind(_cannot_be_read(path, error)) from error
        raise kind(
            f"`{printable(str(path))}` {_state_of(path)}; expected {expected}. Reading it failed: "
            f"{_in_short(error)}. {remedy}"
        ) from error


def _cannot_be_read(path: Path, error: OSError) -> str:
    return (
        f"`{printable(str(path))}` cannot be read: {os.strerror(error.errno or 0)}. Expected a "
        "file that this process may open. Check its permissions, its disk, and the limit of open "
        "files."
    )


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
