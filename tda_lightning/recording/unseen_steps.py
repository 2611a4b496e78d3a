"""UnseenSteps: warn of optimizer steps that cannot be recorded, since no hook shows them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch.optim import Optimizer

# Gradients are rarely accumulated over more batches.
_MAX_BATCHES = 256


class UnseenSteps:
    """Warns once of a new optimizer, and of a training without a step.

    Args:
        optimizers: Those that exist when training starts.
        warn: Called with the text of a warning.
    """

    def __init__(self, optimizers: Sequence[Optimizer], warn: Callable[[str], None]) -> None:
        self._optimizers, self._warn = list(optimizers), warn
        self._batches_without_step = 0
        self._has_seen_step = self._has_warned_of_optimizer = self._has_warned_of_none = False

    def before_step(self, index: int, optimizer: Optimizer) -> None:
        """Warn if an optimizer takes a step that did not exist when training started."""
        self._has_seen_step = True
        is_known = any(optimizer is known for known in self._optimizers)
        if is_known or self._has_warned_of_optimizer:
            return
        self._has_warned_of_optimizer = True
        self._warn(
            f"GradientRecorder: step {index:,} is taken by a new optimizer, "
            f"{type(optimizer).__name__}; expected those that existed when training started. Its "
            "steps are not recorded. Train with the new optimizer in another `fit`, which "
            "continues the run if the model has the same parameters."
        )

    def end_batch(self, has_backward_pass: bool) -> None:
        """Count the batches until the first step."""
        self._batches_without_step += has_backward_pass
        if self._batches_without_step >= _MAX_BATCHES:
            self.end()

    def end(self) -> None:
        """Warn if batches have led to no step, so that nothing has been recorded."""
        if self._has_seen_step or self._has_warned_of_none or not self._batches_without_step:
            return
        self._has_warned_of_none = True
        self._warn(
            f"GradientRecorder: no step of the {type(self._optimizers[0]).__name__} was seen, so "
            "nothing has been recorded; expected `optimizer.step()` of an optimizer that "
            "`configure_optimizers` returns. An optimizer that takes its steps by another method, "
            "such as SAM, cannot be recorded."
        )
