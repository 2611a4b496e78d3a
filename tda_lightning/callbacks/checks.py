"""What cannot be recorded faithfully yet: refused before the first batch, with the remedy."""

from __future__ import annotations

from typing import Literal

from torch.optim import LBFGS

from tda_lightning.callbacks.either import LightningModule, Trainer
from tda_lightning.callbacks.facts import require_one_rate


def require_supported(
    trainer: Trainer, module: LightningModule, preconditioner: Literal["optimizer", "none"]
) -> None:
    """Raise if this training has a setting under which recorded rows would not be the truth.

    Args:
        trainer: The trainer.
        module: The model.
        preconditioner: Whose coordinates the rows are to be in.

    Raises:
        ValueError: Naming the setting, what was expected, and what to do.
    """
    if not module.automatic_optimization:
        _refuse("manual optimization", "automatic optimization", "Return the loss instead.")
    if trainer.world_size > 1:
        _refuse(f"{trainer.world_size} processes", "one", "Set `Trainer(devices=1)`.")
    if getattr(trainer.precision_plugin, "scaler", None) is not None:
        _refuse(
            "a loss scale (16-mixed)", "32, 64 or bf16 precision", "Set `precision='bf16-mixed'`."
        )
    if trainer.gradient_clip_val and trainer.gradient_clip_algorithm == "value":
        _refuse(
            "gradient clipping by value",
            "clipping by norm",
            "Set `gradient_clip_algorithm='norm'`.",
        )
    for optimizer in trainer.optimizers:
        if isinstance(optimizer, LBFGS):
            _refuse(
                "LBFGS, whose steps evaluate the loss many times", "a first-order optimizer", ""
            )
        if preconditioner == "none":
            require_one_rate(optimizer)


def _refuse(found: str, expected: str, remedy: str) -> None:
    raise ValueError(
        f"`GradientRecorder` cannot record faithfully under {found}; expected {expected}. {remedy} "
        "Or train without the callback.".replace("  ", " ")
    )
