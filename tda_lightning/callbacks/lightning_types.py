"""Lightning's types, of either package, and the processes and the loss scale of a trainer.

``pytorch_lightning`` and ``lightning.pytorch`` are the same code with distinct classes. A callback
of the one works in a trainer of the other, since hooks are looked up by name; only the types
differ.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from tda_lightning.recording.distributed import DistributedContext

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule, Trainer
else:
    LightningModule = Trainer = Any

__all__ = ["LightningModule", "Trainer", "distributed_context", "loss_scale_of"]


def distributed_context(trainer: Trainer) -> DistributedContext:
    """Return the processes that train together."""
    strategy = trainer.strategy

    def add(tensor: Tensor) -> Tensor:
        total: Tensor = strategy.reduce(tensor.clone(), reduce_op="sum")
        return total

    if trainer.world_size == 1:
        return DistributedContext()
    return DistributedContext(trainer.global_rank, trainer.world_size, add)


def loss_scale_of(trainer: Trainer) -> float:
    """Return the factor of the loss in its backward pass."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return 1.0 if scaler is None else float(scaler.get_scale())
