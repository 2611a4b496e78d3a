"""Stand-ins: what a step calls in a pass, in place of its trainer's loggers and optimizers.

They do nothing: weights, gradients, the states of optimizers, and logs stay as they are. A step
that optimizes by hand calls ``self.manual_backward(loss)``, and the graphs of its losses are kept.
With one optimizer, it need not return a loss: its loss is the sum of those that were passed to
``manual_backward``, as their gradients add up.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

# Where a logger keeps its files; the rest writes to them.
_PLACES = frozenset({"name", "version", "save_dir", "log_dir", "root_dir"})


class SilentObject:
    """Accepts every call and every attribute, such as those of a TensorBoard writer."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return SilentObject()

    def __call__(self, *_: object, **__: object) -> Any:
        """Return another silent object."""
        return SilentObject()

    def __getitem__(self, key: object) -> Any:
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


class UnclearLossError(ValueError):
    """A step has several losses, and returned none of them."""


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
            UnclearLossError: If it is unclear which of the losses is meant.
        """
        losses, self._losses = self._losses, []
        has_graph = isinstance(returned, Tensor) and returned.requires_grad
        if has_graph or not losses:
            return returned
        if self._n_optimizers > 1:
            raise UnclearLossError(
                f"`training_step` has {len(losses)} losses for {self._n_optimizers} optimizers, "
                "and returned none of them; expected the one to query. Return it, which changes "
                "nothing in the training, or pass `target=`."
            )
        return torch.stack([loss.reshape(()) for loss in losses]).sum()


@contextmanager
def muted_logging(model: nn.Module) -> Iterator[None]:
    """Let a step log nothing, neither by ``self.log`` nor by ``self.logger.log_metrics``."""
    trainer: Any = getattr(model, "_trainer", None)
    loggers = getattr(trainer, "loggers", None)
    with _overridden(model, {"log": _do_nothing, "log_dict": _do_nothing}):
        if not isinstance(loggers, list) or not loggers:
            yield
            return
        originals = list(loggers)
        trainer.loggers = [MutedLogger(logger) for logger in originals]
        try:
            yield
        finally:
            trainer.loggers = originals


@contextmanager
def idle_optimization(model: nn.Module) -> Iterator[None]:
    """Let a model under manual optimization keep its weights, gradients and optimizers."""
    if getattr(model, "automatic_optimization", True):
        yield
        return
    names = ("optimizers", "lr_schedulers")
    optimizers, schedulers = (_idle(_result_of(model, name)) for name in names)
    stand_ins = {
        "manual_backward": ManualLosses(len(optimizers)),
        "optimizers": lambda *_, **__: _one_or_all(optimizers),
        "lr_schedulers": lambda *_, **__: _one_or_all(schedulers),
        "clip_gradients": _do_nothing,
    }
    with _overridden(model, stand_ins):
        yield


def manual_losses(model: nn.Module) -> ManualLosses | None:
    """Return the stand-in for ``manual_backward`` of a model, if it has one."""
    stand_in = vars(model).get("manual_backward")
    return stand_in if isinstance(stand_in, ManualLosses) else None


@contextmanager
def _overridden(model: nn.Module, methods: Mapping[str, Any]) -> Iterator[None]:
    """Replace methods of a model, and restore them afterwards."""
    attributes = vars(model)
    originals = {name: attributes[name] for name in methods if name in attributes}
    attributes.update(methods)
    try:
        yield
    finally:
        for name in methods:
            del attributes[name]
        attributes.update(originals)


def _result_of(model: Any, name: str) -> Any:
    """Return what a method of the model returns, nothing without a trainer."""
    try:
        return getattr(model, name)()
    except (RuntimeError, AttributeError):  # A loaded model is attached to no trainer.
        return None


def _idle(result: Any) -> list[IdleOptimizer]:
    wrapped = result if isinstance(result, list | tuple) else [result]
    return list(map(IdleOptimizer, wrapped)) or [IdleOptimizer()]


def _one_or_all(stand_ins: Sequence[IdleOptimizer]) -> Any:
    return stand_ins[0] if len(stand_ins) == 1 else list(stand_ins)


def _do_nothing(*_: object, **__: object) -> None:
    return None
