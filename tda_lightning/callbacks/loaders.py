"""Where a training loader can be watched: when Lightning has made it what it is, before it is used.

That is the last thing a strategy does with a loader. Any later would change the order of the data.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from tda_lightning.callbacks.lightning_types import Trainer
from tda_lightning.callbacks.method_watchers import watch_method

_Watcher = Callable[[object], None]


class _WatchedProcess:
    """In the place of a strategy's ``process_dataloader``, as long as somebody watches."""

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self._process = trainer.strategy.process_dataloader
        self.watchers: list[_Watcher] = []

    def __call__(self, dataloader: object) -> object:
        processed = self._process(dataloader)
        if self._trainer.training:
            for watch in self.watchers:
                watch(processed)
        return processed


def watch_loaders(trainer: Trainer, watch: _Watcher) -> Callable[[], None]:
    """Call ``watch`` with every training loader that the trainer is about to iterate.

    Returns:
        What undoes it; the trainer's strategy is as it was once all have done so.
    """
    return watch_method(trainer.strategy, "process_dataloader", _WatchedProcess, trainer, watch)


def training_loaders(trainer: Trainer) -> list[Any]:
    """Return the loaders that the trainer draws each batch from: one, or those of a collection."""
    return list(_leaves(trainer.train_dataloader))


def _leaves(loaders: Any) -> Iterator[Any]:
    if isinstance(loaders, Mapping):
        loaders = list(loaders.values())
    if isinstance(loaders, list | tuple):
        for one in loaders:
            yield from _leaves(one)
    elif hasattr(loaders, "flattened"):
        yield from loaders.flattened
    else:
        yield loaders
