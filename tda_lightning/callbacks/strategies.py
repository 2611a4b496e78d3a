"""Strategies: read the processes and the loss scale of a trainer; refuse unsupported strategies."""

from __future__ import annotations

from torch import Tensor

from tda_lightning.callbacks.lightning_types import Trainer
from tda_lightning.recording.distributed import DistributedContext

# By name, since `lightning` and `pytorch_lightning` have separate classes.
_SINGLE_PROCESS = {"SingleDeviceStrategy"}
_DATA_PARALLEL = {"DDPStrategy"}
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
    """Return the factor of the loss in its backward pass."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return 1.0 if scaler is None else float(scaler.get_scale())


def why_unsupported(trainer: Trainer) -> str:
    """Return why the gradients of a strategy cannot be recorded; an empty string if they can."""
    names = {base.__name__ for base in type(trainer.strategy).__mro__}
    if names & _SHARDED:
        return "parameters and gradients are split, so that no layer has its full gradient"
    if not names & (_SINGLE_PROCESS | _DATA_PARALLEL):
        return "it is not known how it combines gradients"
    return ""
