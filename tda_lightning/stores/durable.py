"""Files of a run: absolute paths, and writes that are atomic and durable."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def absolute_path(path: str | os.PathLike[str]) -> Path:
    """Return a path that no later change of the working directory affects; ``~`` is expanded."""
    # Unlike `Path.expanduser`, this leaves the name of an unknown user as it is.
    return Path(os.path.expanduser(path)).absolute()


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a temporary path to write to; afterwards sync the file and rename it to ``path``.

    If the block raises, the temporary file is deleted, and a file at ``path`` stays unchanged. A
    process that is killed may leave the temporary file, ``.NAME.partial``, which readers ignore.

    Args:
        path: Final name of the file; an existing file is replaced.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        yield partial
        make_durable(partial)
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    make_durable(path.parent)


def make_durable(path: Path) -> None:
    """Wait until the content of a file or folder has reached the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
