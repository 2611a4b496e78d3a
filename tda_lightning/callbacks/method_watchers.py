"""Watched methods: a method of Lightning's that tells several callbacks when it is called."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

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
