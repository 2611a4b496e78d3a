"""Muted loggers: what a step logs in a pass does not reach the logs of the training."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

# Where a logger keeps its files; the rest writes to them.
_PLACES = frozenset({"name", "version", "save_dir", "log_dir", "root_dir"})


class SilentObject:
    """Accepts every call and every attribute, such as those of a TensorBoard writer."""

    def __getattr__(self, name: str) -> Any:
        """Return another silent object."""
        if name.startswith("__"):
            raise AttributeError(name)
        return SilentObject()

    def __call__(self, *_: object, **__: object) -> Any:
        """Return another silent object."""
        return SilentObject()

    def __getitem__(self, key: object) -> Any:
        """Return another silent object."""
        return SilentObject()

    def __iter__(self) -> Iterator[Any]:
        """Yield nothing; without this, a loop over indices would never end."""
        return iter(())


class MutedLogger(SilentObject):
    """Stands for a logger, and writes nothing."""

    def __init__(self, wrapped: object) -> None:
        self.wrapped = wrapped

    def __getattr__(self, name: str) -> Any:
        """Return the place of the logger's files, or a silent object."""
        return getattr(self.wrapped, name) if name in _PLACES else super().__getattr__(name)


@contextmanager
def muted_loggers(model: nn.Module) -> Iterator[None]:
    """Let the loggers of a model's trainer write nothing, as in ``self.logger.log_metrics``."""
    trainer: Any = getattr(model, "_trainer", None)
    loggers = getattr(trainer, "loggers", None)
    if not isinstance(loggers, list) or not loggers:
        yield
        return
    originals = list(loggers)
    trainer.loggers = [MutedLogger(logger) for logger in originals]
    try:
        yield
    finally:
        trainer.loggers = originals
