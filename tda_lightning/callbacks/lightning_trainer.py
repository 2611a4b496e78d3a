"""Lightning's trainer, as callbacks use it: its types, processes and loss scale, watched methods.

``pytorch_lightning`` and ``lightning.pytorch`` are the same code with distinct classes. A callback
of the one works in a trainer of the other, since hooks are looked up by name; only the types
differ. Watchers are called when the trainer loads data or clips gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from typing import TYPE_CHECKING, Any, TypeVar, cast

from torch import Tensor
from torch.optim import Optimizer

from tda_lightning.recording.settings import DistributedContext

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule, Trainer
else:
    LightningModule = Trainer = Any

T = TypeVar("T")

__all__ = [
    "LightningModule",
    "Trainer",
    "distributed_context",
    "from_first_process",
    "loss_scale_of",
    "sampler_pass",
    "training_loaders",
    "watch_clipping",
    "watch_loaders",
    "watch_method",
    "watch_transfers",
]


def distributed_context(trainer: Trainer) -> DistributedContext:
    """Return the processes that train together."""
    strategy = trainer.strategy

    def add(tensor: Tensor) -> Tensor:
        total: Tensor = strategy.reduce(tensor.clone(), reduce_op="sum")
        return total

    if trainer.world_size == 1:
        return DistributedContext()
    return DistributedContext(trainer.global_rank, trainer.world_size, add)


def from_first_process(trainer: Trainer, work: Callable[[], T]) -> T:
    """Let the first process do some work, and return its result in all of them.

    All processes fail together; otherwise they would wait for each other forever.
    """
    outcome: tuple[T | None, Exception | None] = None, None
    if trainer.is_global_zero:
        try:
            outcome = work(), None
        except Exception as failure:
            outcome = None, failure
    result, error = trainer.strategy.broadcast(outcome)
    if error is not None:
        raise error
    return cast(T, result)


def loss_scale_of(trainer: Trainer) -> float:
    """Return the factor of the loss in its backward pass."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return 1.0 if scaler is None else float(scaler.get_scale())


def watch_method(
    owner: object, name: str, stand_in: type[Any], trainer: Trainer, watch: Callable[..., Any]
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
    """Call ``watch`` with every training loader that the trainer is about to iterate."""
    return watch_method(trainer.strategy, "process_dataloader", _WatchedProcess, trainer, watch)


def training_loaders(trainer: Trainer) -> list[Any]:
    """Return the loaders of each batch: one, or those of a collection."""
    return list(_leaves(trainer.train_dataloader))


def sampler_pass(trainer: Trainer) -> object:
    """Return the trainer's present pass over the sampler of its loader, ``None`` if not found."""
    loop: Any = trainer.fit_loop
    modes = getattr(getattr(loop, "_combined_loader", None), "_iterator", None)
    iterators: Sequence[Any] = getattr(modes, "iterators", ())
    return getattr(iterators[0], "_sampler_iter", None) if len(iterators) == 1 else None


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


_TransferWatcher = Callable[[Any], AbstractContextManager[object]]


class _WatchedTransfer:
    """Replaces a strategy's ``batch_to_device`` while there are watchers.

    Inside, the model's hook ``on_after_batch_transfer`` may change the batch.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self._transfer = trainer.strategy.batch_to_device
        self.watchers: list[_TransferWatcher] = []

    def __call__(self, batch: Any, *arguments: Any, **named: Any) -> Any:
        with ExitStack() as open_contexts:
            for watch in self.watchers if self._trainer.training else ():
                open_contexts.enter_context(watch(batch))
            return self._transfer(batch, *arguments, **named)


def watch_transfers(trainer: Trainer, watch: _TransferWatcher) -> Callable[[], None]:
    """Open a context of ``watch`` around every transfer of a training batch to its device."""
    return watch_method(trainer.strategy, "batch_to_device", _WatchedTransfer, trainer, watch)


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

    It is given the index of the step, its optimizer and the bound.
    """
    return watch_method(
        trainer.precision_plugin, "clip_gradients", _WatchedClipping, trainer, watch
    )
