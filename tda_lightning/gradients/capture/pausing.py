"""PauseSwitch: hide one capture's extra passes through a model from that model's other captures.

The switches of one model find each other; those of other models are not affected, so several
threads can record and query models of their own. The state is not kept per thread: on a GPU,
backward passes run in threads of torch. It belongs to a capture, and ends with it.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from weakref import WeakSet

from torch import nn

_attached: WeakSet[PauseSwitch] = WeakSet()
_lock = threading.Lock()


class PauseSwitch:
    """Holds whether a capture is paused, and pauses it together with the model's other captures.

    Args:
        model: The model whose layers the capture hooks.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._modules: frozenset[int] = frozenset()
        # The switches of other attached captures that hook the same modules.
        self._others: frozenset[PauseSwitch] = frozenset()
        self._thread: int | None = None
        # One entry per open context. An interrupt cannot leave one behind: each is removed again
        # even if it has not been added yet.
        self._pauses: set[object] = set()

    def attach(self) -> None:
        """Find, and be found by, the switches of captures that hook the same modules.

        Raises:
            RuntimeError: If another thread is recording or querying the same model.
        """
        self._modules = frozenset(map(id, self._model.modules()))
        with _lock:
            others = self._related()
            if any(other.is_in_another_thread() for other in others):
                raise RuntimeError(
                    f"The model `{type(self._model).__name__}` is being recorded or queried by "
                    "another thread; expected a model that one thread uses at a time. Give each "
                    "thread a copy, such as `copy.deepcopy(model)`."
                )
            self._thread, self._others = threading.get_ident(), others
            self._pauses = set()
            for other in others:
                other._others |= {self}
            _attached.add(self)

    def detach(self) -> None:
        """Undo :meth:`attach`."""
        with _lock:
            _attached.discard(self)
            for other in self._others:
                other._others -= {self}
            self._thread, self._others = None, frozenset()

    def is_paused(self) -> bool:
        """Return whether the capture is paused."""
        return bool(self._pauses)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Pause this capture and all others of its model inside the context."""
        with _all_paused(self._others | {self}):
            yield

    @contextmanager
    def others_paused(self) -> Iterator[None]:
        """Pause the model's other captures inside the context, and only those."""
        before, self._pauses = self._pauses, set()
        try:
            with _all_paused(self._others):
                yield
        finally:
            self._pauses = before

    def is_in_another_thread(self) -> bool:
        """Return whether another thread that is still running has attached this switch."""
        running = {thread.ident for thread in threading.enumerate()}
        return self._thread in running - {threading.get_ident()}

    def _related(self) -> frozenset[PauseSwitch]:
        related = {other for other in _attached if not self._modules.isdisjoint(other._modules)}
        return frozenset(related - {self})


@contextmanager
def _all_paused(switches: frozenset[PauseSwitch]) -> Iterator[None]:
    token = object()
    try:
        for switch in switches:
            switch._pauses.add(token)
        yield
    finally:
        for switch in switches:
            switch._pauses.discard(token)
