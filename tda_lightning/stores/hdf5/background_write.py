"""BackgroundWrite: write one segment in a thread, whatever interrupts the main thread meanwhile."""

from __future__ import annotations

from collections.abc import Callable
from threading import Lock, Thread
from typing import Generic, TypeVar

Result = TypeVar("Result")


class BackgroundWrite(Generic[Result]):
    """A segment that is written in a thread, once :meth:`start` is called.

    Creating it before its thread starts lets the store hold it first. A signal handler may raise
    while a thread starts. The store would then start a second write of the same file, and the two
    would overwrite each other.
    """

    def __init__(self, write: Callable[[], Result]) -> None:
        self._write = write
        self._lock = Lock()
        self._results: list[Result] = []
        self._error: BaseException | None = None
        # Not a daemon thread: the process waits for it before it exits.
        self._thread = Thread(target=self._run, name="tda_lightning", daemon=False)

    def start(self) -> None:
        """Start writing."""
        self._thread.start()

    def result(self) -> Result:
        """Wait until the segment is written, and return it; write it here if no thread has.

        Raises:
            OSError: If writing failed.
        """
        with self._lock:
            if self._error is not None:
                raise self._error
            if not self._results:  # An interrupted call leaves the work to the next one.
                self._results.append(self._write())
            return self._results[0]

    def _run(self) -> None:
        with self._lock:
            if not self._results:
                try:
                    self._results.append(self._write())
                except BaseException as error:
                    self._error = error
