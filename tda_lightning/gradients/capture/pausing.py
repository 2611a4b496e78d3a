"""PauseSwitch: hide one capture's extra passes through a model from that model's other captures.

The switches of one model find each other; those of other models are not affected, so several
threads can record and query separate models. The state is not kept per thread: on a GPU,
backward passes run in threads of torch. It belongs to a capture, and ends with it.

Extra passes leave no trace in the buffers: an activation checkpoint runs its modules in each.
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
    """Pauses a capture, together with the model's other captures or without.

    Attributes:
        pauses: The open contexts that pause the capture.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._modules: frozenset[int] = frozenset()
        # The switches of other attached captures that hook the same modules.
        self._others: frozenset[PauseSwitch] = frozenset()
        self._thread: int | None = None
        # An interrupt cannot leave an entry behind: each is removed even if it was never added.
        self.pauses: set[object] = set()

    def attach(self) -> None:
        """Find, and be found by, the switches of captures that hook the same modules.

        Raises:
            RuntimeError: If another thread is recording or querying the same model.
        """
        self._modules = frozenset(map(id, self._model.modules()))
        with _lock:
            attached = {s for s in _attached if not self._modules.isdisjoint(s._modules)}
            others = frozenset(attached - {self})
            if any(other.is_in_another_thread() for other in others):
                raise RuntimeError(
                    f"The model `{type(self._model).__name__}` is being recorded or queried by "
                    "another thread; expected a model that one thread uses at a time. Give each "
                    "thread a copy, such as `copy.deepcopy(model)`."
                )
            self._thread, self._others = threading.get_ident(), others
            self.pauses = set()
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

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Pause this capture and all others of its model inside the context."""
        with _all_paused(self._others | {self}), _buffers_kept(self._model):
            yield

    @contextmanager
    def others_paused(self) -> Iterator[None]:
        """Pause the model's other captures inside the context, and only those."""
        before, self.pauses = self.pauses, set()
        try:
            with _all_paused(self._others), _buffers_kept(self._model):
                yield
        finally:
            self.pauses = before

    def is_in_another_thread(self) -> bool:
        """Return whether another thread that is still running has attached this switch."""
        running = {thread.ident for thread in threading.enumerate()}
        return self._thread in running - {threading.get_ident()}


@contextmanager
def claimed(model: nn.Module) -> Iterator[None]:
    """Let no other thread record or query the model inside the context.

    Raises:
        RuntimeError: If one does so already.
    """
    switch = PauseSwitch(model)
    switch.attach()
    try:
        yield
    finally:
        switch.detach()


@contextmanager
def _all_paused(switches: frozenset[PauseSwitch]) -> Iterator[None]:
    token = object()
    try:
        for switch in switches:
            switch.pauses.add(token)
        yield
    finally:
        for switch in switches:
            switch.pauses.discard(token)


@contextmanager
def _buffers_kept(model: nn.Module) -> Iterator[None]:
    """Put the buffers back afterwards, such as the running statistics of batch norms.

    The tensors keep their versions: the graph of the batch may have saved them.
    """
    places = [(module._buffers, dict(module._buffers)) for module in model.modules()]
    tensors = [tensor for _, buffers in places for tensor in buffers.values()]
    kept = [(t.data, t.data.clone()) for t in tensors if t is not None and not t.is_inference()]
    try:
        yield
    finally:
        for place, buffers in places:
            place.update(buffers)
        for tensor, values in kept:
            tensor.copy_(values)
