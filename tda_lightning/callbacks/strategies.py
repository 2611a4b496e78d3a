"""What of a trainer's strategy and precision rows depend on, and where they cannot be told."""

from __future__ import annotations

from torch import Tensor

from tda_lightning.callbacks.lightning_types import Trainer
from tda_lightning.recording.distributed import DistributedContext

# By name, since either package has classes of its own.
_ALONE = {"SingleDeviceStrategy"}
_TOGETHER = {"DDPStrategy"}
_SHARDED = {"FSDPStrategy", "DeepSpeedStrategy", "ModelParallelStrategy"}


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
    """Return what the loss is multiplied by before its backward pass."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return 1.0 if scaler is None else float(scaler.get_scale())


def why_unsupported(trainer: Trainer) -> str:
    """Return why the gradients of a strategy are not those of whole layers, or nothing."""
    names = {base.__name__ for base in type(trainer.strategy).__mro__}
    if names & _SHARDED:
        return "parameters and gradients are cut into pieces that no layer sees whole"
    if not names & (_ALONE | _TOGETHER):
        return "it is not known how it combines gradients"
    return ""
