"""Method watchers: notify callbacks of calls of Lightning's methods (data loading, clipping)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch.optim import Optimizer

from tda_lightning.callbacks.lightning_types import Trainer


def watch_method(
    owner: object, name: str, stand_in: type[Any], trainer: Trainer, watch: Callable[..., None]
) -> Callable[[], None]:
    """Replace a method by a stand-in that notifies watchers; several watchers share one stand-in.

    Args:
        owner: The object that has the method.
        name: The method's name.
        stand_in: Class of the stand-in, created from the trainer. It has a list of ``watchers``.
        trainer: The trainer.
        watch: Called by the stand-in.

    Returns:
        A function that unregisters the watcher; the last one restores the original method.
    """
    watched: Any = vars(owner).get(name)
    if not isinstance(watched, stand_in):
        watched = stand_in(trainer)
        setattr(owner, name, watched)
    watched.watchers.append(watch)

    def undo() -> None:
        watched.watchers.remove(watch)
        if not watched.watchers:
            delattr(owner, name)

    return undo


_LoaderWatcher = Callable[[object], None]
_ClippingWatcher = Callable[[int, Optimizer, float], None]


class _WatchedProcess:
    """Replaces a strategy's ``process_dataloader`` while there are watchers.

    This is the last thing that a strategy does with a loader before it is used. Watching any later
    would change the order of the data.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self._process = trainer.strategy.process_dataloader
        self.watchers: list[_LoaderWatcher] = []

    def __call__(self, dataloader: object) -> object:
        processed = self._process(dataloader)
        if self._trainer.training:
            for watch in self.watchers:
                watch(processed)
        return processed


def watch_loaders(trainer: Trainer, watch: _LoaderWatcher) -> Callable[[], None]:
    """Call ``watch`` with every training loader that the trainer is about to iterate.

    Returns:
        A function that unregisters the watcher; the last one restores the trainer's strategy.
    """
    return watch_method(trainer.strategy, "process_dataloader", _WatchedProcess, trainer, watch)


def training_loaders(trainer: Trainer) -> list[Any]:
    """Return the loaders of each batch: one, or those of a collection."""
    return list(_leaves(trainer.train_dataloader))


def _leaves(loaders: Any) -> Iterator[Any]:
    if isinstance(loaders, Mapping):
        loaders = list(loaders.values())
    if isinstance(loaders, list | tuple):
        for loader in loaders:
            yield from _leaves(loader)
    elif hasattr(loaders, "flattened"):
        yield from loaders.flattened
    else:
        yield loaders


class _WatchedClipping:
    """Replaces a precision plugin's ``clip_gradients`` while there are watchers."""

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self._clip = trainer.precision_plugin.clip_gradients
        self.watchers: list[_ClippingWatcher] = []

    def __call__(
        self, optimizer: Optimizer, clip_val: float = 0.0, gradient_clip_algorithm: str = "norm"
    ) -> None:
        if gradient_clip_algorithm == "value" and clip_val > 0:
            # Under manual optimization, the optimizer is wrapped by a `LightningOptimizer`.
            wrapped = getattr(optimizer, "_optimizer", optimizer)
            for watch in self.watchers:
                watch(self._trainer.global_step, wrapped, float(clip_val))
        self._clip(optimizer, clip_val, gradient_clip_algorithm)  # type: ignore[arg-type]


def watch_clipping(trainer: Trainer, watch: _ClippingWatcher) -> Callable[[], None]:
    """Call ``watch`` before every clipping by value, by Lightning or by the user.

    Args:
        trainer: The trainer.
        watch: Called with the index of the step, its optimizer and the bound.

    Returns:
        A function that unregisters the watcher; the last one restores the plugin's method.
    """
    return watch_method(
        trainer.precision_plugin, "clip_gradients", _WatchedClipping, trainer, watch
    )
