"""Files of a run: writes that are atomic and durable."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tda_lightning.stores.integrity.damage import StoreFileError

# Windows lacks these.
NO_FOLLOW = getattr(os, "O_NOFOLLOW", 0)
NO_BLOCK = getattr(os, "O_NONBLOCK", 0)


@contextmanager
def atomic_write(path: Path, permit: Callable[[], None] = lambda: None) -> Iterator[Path]:
    """Yield a temporary file to write to; afterwards sync it and rename it to ``path``.

    If the block raises, the temporary file is deleted, and a file at ``path`` stays unchanged. A
    process that is killed may leave the temporary file, ``.NAME.partial``, which readers ignore.
    A link under that name, which a stranger may have put there, is deleted and not followed.

    Args:
        path: Final name of the file; an existing file is replaced.
        permit: Raises if the file must not be renamed any more; called right before.

    Raises:
        FileNotFoundError: If the folder of the file does not exist.
    """
    if not path.parent.is_dir():
        raise FileNotFoundError(
            f"There is no folder `{path.parent}` for `{path.name}`; expected an existing one. "
            "Create it, or correct the path."
        )
    partial = path.with_name(f".{path.name}.partial")
    try:
        create(partial)
        yield partial
        make_durable(partial)
        permit()
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    make_durable(path.parent)


def create(path: Path) -> None:
    """Create an empty file, and delete one that a killed process has left."""
    path.unlink(missing_ok=True)
    os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | NO_FOLLOW, 0o666))


def make_durable(path: Path) -> None:
    """Wait until the content of a file or folder has reached the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def writing_to(path: Path) -> Iterator[None]:
    """Turn errors of the system inside the context into one that names the folder.

    Raises:
        StoreFileError: If the folder cannot be written.
    """
    try:
        yield
    except OSError as error:
        if error.errno is None:  # It has our message already.
            raise
        raise StoreFileError(
            f"`{path}` cannot be written: {error.strerror or error}. Expected a folder that can be "
            "created, on a disk with space. Choose another path, or make space."
        ) from error
