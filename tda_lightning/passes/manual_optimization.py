"""Manual optimization in a pass: compute the losses of a step without any backward pass or update.

A ``training_step`` that optimizes by hand calls ``self.manual_backward(loss)`` and the optimizers.
In a pass, it gets stand-ins that do nothing: weights, gradients and the states of the optimizers
stay, and the graphs of its losses are kept. A step with one optimizer need not return a loss: its
loss is the sum of those that were passed to ``manual_backward``, as their gradients add up.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn


class IdleOptimizer:
    """Stands for an optimizer, or for a scheduler, and takes no step."""

    def __init__(self, wrapped: Any = None) -> None:
        self.wrapped = wrapped

    def step(self, closure: Any = None, *_: object, **__: object) -> Any:
        """Compute the closure's loss, if there is one."""
        return closure() if callable(closure) else None

    def zero_grad(self, *_: object, **__: object) -> None:
        """Do nothing."""

    def toggle_model(self, *_: object, **__: object) -> Any:
        """Return a context that does nothing."""
        return nullcontext()

    def __getattr__(self, name: str) -> Any:
        """Look up every other attribute on the optimizer."""
        if name.startswith("__") or name == "wrapped":
            raise AttributeError(name)
        return getattr(self.wrapped, name)


class ManualLosses:
    """Stands for ``manual_backward``: collects the losses of a step instead.

    ``n_optimizers`` is the number of optimizers that may use their gradients.
    """

    def __init__(self, n_optimizers: int) -> None:
        self._n_optimizers = n_optimizers
        self._losses: list[Tensor] = []

    def __call__(self, loss: Tensor, *_: object, **__: object) -> None:
        """Collect a loss."""
        self._losses.append(loss)

    def total(self, returned: Any) -> Any:
        """Return the loss of the step that has just ended.

        Args:
            returned: What the step returned as its loss. It takes precedence, unless it has no
                graph; many steps return a detached loss for their logs.

        Raises:
            TypeError: If it is unclear which of the losses is meant.
        """
        losses, self._losses = self._losses, []
        has_graph = isinstance(returned, Tensor) and returned.requires_grad
        if has_graph or not losses:
            return returned
        if self._n_optimizers > 1:
            raise TypeError(
                f"`training_step` has {len(losses)} losses for {self._n_optimizers} optimizers, "
                "and returned none of them; expected the one to query. Return it, which changes "
                "nothing in the training, or pass `target=`"
            )
        return torch.stack([loss.reshape(()) for loss in losses]).sum()


@contextmanager
def idle_optimization(model: nn.Module) -> Iterator[None]:
    """Let a model under manual optimization keep its weights, gradients and optimizers."""
    if getattr(model, "automatic_optimization", True):
        yield
        return
    optimizers, schedulers = (_idle(_attribute_of(model, name)) for name in _FROM_TRAINER)
    stand_ins = {
        "manual_backward": ManualLosses(len(optimizers)),
        "optimizers": lambda *_, **__: _one_or_all(optimizers),
        "lr_schedulers": lambda *_, **__: _one_or_all(schedulers),
        "clip_gradients": _do_nothing,
    }
    attributes = vars(model)
    overridden = {name: attributes[name] for name in stand_ins if name in attributes}
    attributes.update(stand_ins)
    try:
        yield
    finally:
        for name in stand_ins:
            del attributes[name]
        attributes.update(overridden)


def manual_losses(model: nn.Module) -> ManualLosses | None:
    """Return the stand-in for ``manual_backward`` of a model, if it has one."""
    stand_in = vars(model).get("manual_backward")
    return stand_in if isinstance(stand_in, ManualLosses) else None


_FROM_TRAINER = ("optimizers", "lr_schedulers")


def _attribute_of(model: Any, name: str) -> Any:
    """Return what a method of the model returns, nothing without a trainer."""
    try:
        return getattr(model, name)()
    except (RuntimeError, AttributeError):  # A loaded model is attached to no trainer.
        return None


def _idle(found: Any) -> list[IdleOptimizer]:
    each = found if isinstance(found, list | tuple) else [found]
    return [IdleOptimizer(one) for one in each] or [IdleOptimizer()]


def _one_or_all(stand_ins: Sequence[IdleOptimizer]) -> Any:
    return stand_ins[0] if len(stand_ins) == 1 else list(stand_ins)


def _do_nothing(*_: object, **__: object) -> None:
    return None
