"""Run trainings in several processes that end with their parent, however it ends."""

from __future__ import annotations

import os
import pickle
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import parent_process
from typing import Any

import torch


def require_importable(functions: Mapping[str, Callable[..., Any]]) -> None:
    """Check that other processes can import the functions in some of the user's arguments."""
    is_interactive = not hasattr(sys.modules["__main__"], "__file__")
    for name, function in functions.items():
        try:
            pickle.dumps(function)
            is_importable = not is_interactive or getattr(function, "__module__", "") != "__main__"
        except (pickle.PicklingError, AttributeError, TypeError):
            is_importable = False
        if not is_importable:
            raise ValueError(
                f"Other processes cannot import `{name}`, which is {function!r}; expected a "
                "function at the top of a file. Move it into a module, or pass `processes=1`."
            )


def run_in_processes(
    function: Callable[..., Any], calls: Mapping[int, Sequence[Any]], processes: int
) -> Iterator[tuple[int, Any]]:
    """Yield the result of each call, by its number, in the order in which they finish.

    Raises:
        RuntimeError: If a call fails, or a process ends. Calls that have not begun are dropped.
    """
    # Forked processes would share the parent's threads and its devices.
    context = torch.multiprocessing.get_context("spawn")
    threads = max(torch.get_num_threads() // processes, 1)
    pool = ProcessPoolExecutor(processes, context, initializer=_initialize, initargs=(threads,))
    try:
        waiting: dict[Future[Any], int] = {
            pool.submit(function, *arguments): number for number, arguments in calls.items()
        }
        while waiting:
            done, _ = wait(waiting, return_when=FIRST_COMPLETED)
            # Results first: those that are finished are kept if another call has failed.
            for future in sorted(done, key=lambda future: future.exception() is not None):
                number = waiting.pop(future)
                yield number, _result_of(future, number)
    finally:
        pool.shutdown(cancel_futures=True)


def _result_of(future: Future[Any], number: int) -> Any:
    try:
        return future.result()
    except BrokenProcessPool as error:
        raise RuntimeError(
            "A process of the retraining ended, or could not start; expected it to finish. Out of "
            "memory, use fewer `processes`. In a script, call `retrain` below "
            '`if __name__ == "__main__":`. With `folder=`, the same call continues.'
        ) from error
    except Exception as error:
        raise RuntimeError(
            f"Training {number} of the plan failed: {type(error).__name__}: {error}. With "
            "`folder=`, the same call continues once this is fixed."
        ) from error


def _initialize(threads: int) -> None:
    torch.set_num_threads(threads)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """End this process once its parent has: a killed parent would leave it waiting forever."""
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
