"""Watched methods: a method of Lightning's that tells several callbacks when it is called."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch.optim import Optimizer

from tda_lightning.callbacks.lightning_types import Trainer


def watch_method(
    owner: object, name: str, stand_in: type[Any], trainer: Trainer, watch: Callable[..., None]
) -> Callable[[], None]:
    """Watch a method by way of what stands in for it; several watchers share one stand-in.

    Args:
        owner: The object whose method it is.
        name: The method's name.
        stand_in: Made from the trainer; it has a list of ``watchers``.
        trainer: The trainer.
        watch: Told of calls, as the stand-in sees fit.

    Returns:
        What undoes it; the owner is as it was once all have done so.
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
    """In the place of a strategy's ``process_dataloader``, as long as somebody watches."""

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


class _WatchedClipping:
    """In the place of a precision plugin's ``clip_gradients``, as long as somebody watches."""

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self._clip = trainer.precision_plugin.clip_gradients
        self.watchers: list[_ClippingWatcher] = []

    def __call__(
        self, optimizer: Optimizer, clip_val: float = 0.0, gradient_clip_algorithm: str = "norm"
    ) -> None:
        if gradient_clip_algorithm == "value" and clip_val > 0:
            # In manual optimization, Lightning's own stands around the optimizer.
            wrapped = getattr(optimizer, "_optimizer", optimizer)
            for watch in self.watchers:
                watch(self._trainer.global_step, wrapped, float(clip_val))
        self._clip(optimizer, clip_val, gradient_clip_algorithm)  # type: ignore[arg-type]


def watch_clipping(trainer: Trainer, watch: _ClippingWatcher) -> Callable[[], None]:
    """Listen to the trainer's clipping by value, whoever asks for it.

    Args:
        trainer: The trainer.
        watch: Called beforehand, with the index of the step, its optimizer and the bound.

    Returns:
        What undoes it; the trainer's precision plugin is as it was once all have done so.
    """
    return watch_method(
        trainer.precision_plugin, "clip_gradients", _WatchedClipping, trainer, watch
    )
