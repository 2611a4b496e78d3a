"""Checks: refuse trainings that cannot be recorded faithfully, before the first batch.

The last one is for errors during training: whether one of them comes from the recorder.
"""

from __future__ import annotations

import signal
import traceback
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

from pytorch_lightning.utilities import rank_zero_warn
from torch import Tensor
from torch.optim import LBFGS, Optimizer

from tda_lightning.callbacks.lightning_trainer import LightningModule, Trainer, training_loaders
from tda_lightning.callbacks.messages import note
from tda_lightning.gradients.capture.delivery import NO_EFFECT
from tda_lightning.gradients.losses import Reduction
from tda_lightning.recording.trained_layers import require_one_rate
from tda_lightning.recording.training_recorder import TrainingRecorder
from tda_lightning.stores.recipe import LeftOut, Recipe

# By name, since `lightning` and `pytorch_lightning` have separate classes.
_SINGLE_PROCESS = {"SingleDeviceStrategy"}
_DATA_PARALLEL = {"DDPStrategy"}
_SHARDED = {"FSDPStrategy", "DeepSpeedStrategy", "ModelParallelStrategy"}


def require_supported(
    trainer: Trainer, module: LightningModule, preconditioner: Literal["optimizer", "none"]
) -> None:
    """Check that rows can be recorded faithfully under the settings of this training.

    Raises:
        ValueError: If not. The message names the setting, what was expected, and the remedy.
    """
    reason = _why_unsupported(trainer)
    if reason:
        _refuse(
            f"the strategy `{type(trainer.strategy).__name__}`, where {reason}",
            "one process, or several with `strategy='ddp'`",
            "Set one of these.",
        )
    has_scale = getattr(trainer.precision_plugin, "scaler", None) is not None
    for optimizer in trainer.optimizers:
        _require_supported_optimizer(optimizer, has_scale)
        if preconditioner == "none":
            require_one_rate(optimizer)


def settled_reduction(
    trainer: Trainer,
    recorder: TrainingRecorder,
    loss: Tensor,
    given: Reduction | None,
    recipe: Recipe,
) -> Recipe:
    """Infer how the first loss combines its samples; warn if that cannot be recorded as such.

    The recorder uses the inferred reduction from now on, unless the user has given one. The result
    is the recipe with it.
    """
    inferred = recorder.reduction_of(loss, 1 / trainer.accumulate_grad_batches)
    if trainer.world_size > 1:
        inferred = trainer.strategy.broadcast(inferred)
    if inferred is None or inferred == recipe.reduction:
        return recipe
    if given is None:
        recorder.use_reduction(inferred)
        return replace(recipe, reduction=inferred)
    rank_zero_warn(
        f"GradientRecorder: `reduction` is {given!r}, but the first loss is the {inferred} over "
        f"its samples; expected {inferred!r}. Weights and scores will be off by the batch size."
    )
    return recipe


def lost_blocks(recipe: Recipe) -> list[LeftOut]:
    """Return the entries of a recipe for blocks that turned out not to be recordable."""
    return [entry for entry in recipe.left_out if entry.name in recipe.block_names]


def warn_of(entries: Sequence[LeftOut]) -> None:
    """Name parameters that are not recorded."""
    for entry in entries:
        # What has no effect is not missing from the rows.
        report = note if NO_EFFECT in entry.reason else rank_zero_warn
        report(f"GradientRecorder: {entry.describe()}")


def require_one_loader(trainer: Trainer) -> None:
    """Check that batches come from one loader, so that an index identifies a sample."""
    count = len(training_loaders(trainer))
    if count > 1:
        raise ValueError(
            f"Batches come from {count} training loaders at once, so that an index does not "
            "identify a sample; expected one loader. Pass `sample_ids=`, a function from the batch "
            "to one integer per sample, and pass the samples of all loaders through the model in "
            "one call: see `Several loaders` in docs/gotchas.md."
        )


def _require_supported_optimizer(optimizer: Optimizer, has_scale: bool) -> None:
    name = type(optimizer).__name__
    if isinstance(optimizer, LBFGS):
        _refuse("LBFGS, whose steps evaluate the loss many times", "a first-order optimizer", "")
    if not hasattr(optimizer, "register_step_post_hook"):
        _refuse(
            f"the optimizer `{name}`, which does not report its steps",
            "a `torch.optim.Optimizer` whose `__init__` was called",
            "Derive it from that class.",
        )
    if any(group.get("lr") is None for group in optimizer.param_groups):
        _refuse(
            f"`lr=None` in the `{name}`, whose learning rate is then not visible",
            "a learning rate in every parameter group",
            "Pass `lr=`; Adafactor also needs `relative_step=False`.",
        )
    if any(group.get("maximize") for group in optimizer.param_groups):
        _refuse(
            f"`maximize=True` in the `{name}`, which raises what `training_step` returns, so that "
            "each sample's contribution would have the wrong sign",
            "an optimizer that minimizes",
            "Return the negative from `training_step`, and leave `maximize` out.",
        )
    if has_scale and getattr(optimizer, "_step_supports_amp_scaling", False):
        _refuse(
            f"a fused `{name}` with a loss scale (16-mixed), which skips steps unseen",
            "an optimizer that is not fused",
            "Set `fused=False`.",
        )


def _refuse(setting: str, expected: str, remedy: str) -> None:
    raise ValueError(
        f"`GradientRecorder` cannot record faithfully under {setting}; expected {expected}. "
        f"{remedy} Or train without the callback.".replace("  ", " ")
    )


def _why_unsupported(trainer: Trainer) -> str:
    """Return why the gradients of a strategy cannot be recorded; an empty string if they can."""
    names = {base.__name__ for base in type(trainer.strategy).__mro__}
    if names & _SHARDED:
        return "parameters and gradients are split, so that no layer has its full gradient"
    if not names & (_SINGLE_PROCESS | _DATA_PARALLEL):
        return "it is not known how it combines gradients"
    return ""


def is_from_signal_handler(error: BaseException) -> bool:
    """Return whether an exception comes from a signal handler, which may interrupt any line."""
    handlers = [signal.getsignal(number) for number in signal.valid_signals()]
    codes = {_code_of(handler) for handler in handlers if callable(handler)} - {None}
    return any(frame.f_code in codes for frame, _ in traceback.walk_tb(error.__traceback__))


def _code_of(handler: Any) -> Any:
    """Return the code of a function, a method or a callable object."""
    return getattr(handler, "__code__", None) or getattr(type(handler).__call__, "__code__", None)
