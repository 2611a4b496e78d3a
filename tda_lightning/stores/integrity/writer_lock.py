"""WriterLock: only one training at a time writes to a run.

The lock is a file in the folder of the run that names its owner. It needs no locks of the file
system, so it also works where these do not, such as on many network file systems. The owner looks
at it before every write: a training that has lost the lock stops recording.

An owner on the same machine is alive if its process is. Another machine's processes cannot be seen,
so the owner renews the time of the file while it records; without that, it counts as dead after a
while.
"""

from __future__ import annotations

import json
import os
import threading
import time
import uuid
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from weakref import WeakValueDictionary

from tda_lightning.stores.integrity.damage import StoreFileError
from tda_lightning.stores.integrity.durable import NO_BLOCK, NO_FOLLOW
from tda_lightning.stores.integrity.lock_owner import Owner, may_be_alive, read_owner

LOCK = ".writer.lock"
# The owner renews the file this often; without renewal for so long, it is taken for dead.
RENEWAL_SECONDS = 5.0
STALE_SECONDS = 60.0


class RunInUseError(StoreFileError):
    """Another training writes to the run; the message names it."""


# The threads of this process that hold locks, by token.
_threads: WeakValueDictionary[str, threading.Thread] = WeakValueDictionary()


class WriterLock:
    """The right to write to the run in a folder."""

    def __init__(self) -> None:
        self._process = os.getpid()
        self._file = Path(LOCK)
        self._token = ""
        self._is_owner = False
        self._renewed = 0.0

    def acquire(self, folder: Path, run: str) -> None:
        """Become the owner. Earlier owners in this thread, and dead ones, lose the lock.

        Raises:
            RunInUseError: If another training writes to the run.
        """
        self._file, owner = folder / LOCK, Owner.this_process(run)
        _threads[owner.token] = threading.current_thread()  # Before others can see the file.
        if not _create(self._file, owner):
            _require_free(self._file, owner)
            _replace(self._file, owner)
        self._hold(owner.token)
        self.require()

    @contextmanager
    def acquired(self, folder: Path, run: str) -> Iterator[None]:
        """Become the owner, and stay it unless the context raises.

        Raises:
            RunInUseError: If another training writes to the run.
        """
        self.acquire(folder, run)
        try:
            yield
        except BaseException:
            self.release()
            raise

    @contextmanager
    def held(self, folder: Path, run: str) -> Iterator[None]:
        """Hold the lock inside the context, unless it is held already.

        Raises:
            RunInUseError: If another training writes to the run.
        """
        if self._token:
            yield
            return
        self.acquire(folder, run)
        try:
            yield
        finally:
            self.release()

    def join(self, folder: Path) -> None:
        """Write beside the present owner: another process of the same training."""
        self._file = folder / LOCK
        owner = read_owner(self._file)
        self._token, self._process = owner.token if owner else "", os.getpid()

    def require(self) -> None:
        """Check that this training still has the lock, and renew it.

        Raises:
            RunInUseError: If another one has taken it.
        """
        self._require_process()
        owner = read_owner(self._file)
        if self._token and owner is not None and owner.token != self._token:
            raise _in_use(self._file, owner)
        # The owner ends last, so that its processes may find no lock any more.
        if self._is_owner and owner is None and not self._file.exists():
            if not self._file.parent.exists():
                raise FileNotFoundError(
                    f"`{self._file.parent}` is gone; expected the folder of this run. Record again."
                )
            raise RunInUseError(
                f"`{self._file}` is gone; expected the lock of this training. Another training has "
                "written to the folder meanwhile, or somebody has deleted the lock. Record again."
            )
        if time.monotonic() - self._renewed > RENEWAL_SECONDS:
            with suppress(OSError):
                os.utime(self._file, follow_symlinks=False)
            self._renewed = time.monotonic()

    def renew(self) -> None:
        """Show that the owner is alive; costs nothing if called often.

        Raises:
            RunInUseError: If another training has taken the lock, or in a fork of the owner.
        """
        self._require_process()
        if self._token and time.monotonic() - self._renewed > RENEWAL_SECONDS:
            self.require()

    def release(self) -> None:
        """Let other trainings write; does nothing if the lock is not held."""
        if self._is_owner:
            _release(self._file, self._token, os.getpid())
        self._token, self._is_owner = "", False

    def _require_process(self) -> None:
        if self._token and self._process != os.getpid():
            raise RunInUseError(
                f"This process is a fork of process {self._process}, which writes to "
                f"`{self._file.parent}`; expected only that one. Record there, or into another "
                "folder."
            )

    def _hold(self, token: str) -> None:
        self._token, self._is_owner, self._process = token, True, os.getpid()
        # A store that nobody closes gives the lock back when it is collected, or at exit.
        weakref.finalize(self, _release, self._file, token, os.getpid())


def _create(file: Path, owner: Owner) -> bool:
    """Write a lock; return whether there was none."""
    try:
        descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL | NO_FOLLOW, 0o644)
    except FileExistsError:
        return False
    with open(descriptor, "wb") as stream:
        stream.write(json.dumps(asdict(owner)).encode())
        stream.flush()
        os.fsync(descriptor)
    return True


def _replace(file: Path, owner: Owner) -> None:
    # If two processes find the same dead owner, the later one wins; `require` raises in the other.
    partial = file.with_name(f"{LOCK}-{owner.token}.partial")
    _create(partial, owner)
    try:
        partial.replace(file)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise StoreFileError(
            f"`{file}` cannot be replaced: {error.strerror or error}. Expected the lock of a "
            "training, or nothing. Delete it."
        ) from error


def _release(file: Path, token: str, process: int) -> None:
    # A forked child holds a copy of its parent's lock, which is not its own to release.
    if os.getpid() == process and token:
        owner = read_owner(file)
        if owner is not None and owner.token == token and owner.process == process:
            with suppress(OSError):
                file.unlink()


def _require_free(file: Path, this: Owner) -> None:
    """Wait until the owner of a lock is known to be dead.

    Raises:
        RunInUseError: If it is alive.
    """
    first_time, started = _time_of(file), time.monotonic()
    while (owner := read_owner(file)) is not None or _age_of(file) < 1.0:
        waited = time.monotonic() - started
        if owner is None:  # It has been created, but not yet written.
            if waited > 1.0:
                return
            time.sleep(0.05)
            continue
        if owner.is_same_process(this) and _is_in_another_thread(owner):
            raise _in_use(file, owner)
        if owner.is_same_process(this) or not may_be_alive(owner, this):
            return
        is_renewed = _time_of(file) != first_time
        if is_renewed or (owner.machine and owner.machine == this.machine):
            raise _in_use(file, owner)
        # A lock may be from the future, if a clock has been set back since.
        if max(_age_of(file), waited) > STALE_SECONDS:
            return
        time.sleep(0.2)


def _is_in_another_thread(owner: Owner) -> bool:
    """Return whether another thread of this process holds a lock, and is still running."""
    thread = _threads.get(owner.token)
    return thread is not None and thread is not threading.current_thread() and thread.is_alive()


def _time_of(file: Path) -> int:
    """Return the time of the last renewal, by the clock of the file system."""
    # Opening a file makes a network file system contact its server.
    with suppress(OSError):
        descriptor = os.open(file, os.O_RDONLY | NO_FOLLOW | NO_BLOCK)
        try:
            return os.fstat(descriptor).st_mtime_ns
        finally:
            os.close(descriptor)
    return 0


def _age_of(file: Path) -> float:
    """Return the seconds since the last renewal; infinite if the file is gone."""
    renewed = _time_of(file)
    if not renewed:
        return float("inf")
    # Compare with the time of a new file, since the clocks of machines may differ.
    clock = file.with_name(f"{LOCK}-{uuid.uuid4().hex}.partial")
    try:
        clock.touch()
        return (clock.stat().st_mtime_ns - renewed) / 1e9
    finally:
        clock.unlink(missing_ok=True)


def _in_use(file: Path, owner: Owner) -> RunInUseError:
    return RunInUseError(
        f"`{file.parent}` is being written by another training: {owner.describe()}. Expected only "
        "one at a time. Wait until it ends, or record into another folder."
    )
