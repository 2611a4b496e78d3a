"""Device view: a run whose steps are read onto one device, in one number format."""

from __future__ import annotations

from dataclasses import replace
from math import isfinite

from torch import Tensor

from tda_lightning.stores import Store
from tda_lightning.stores.recipe import Recipe
from tda_lightning.stores.step import Preconditioner, Step, StepFacts


class DeviceView(Store):
    """A view of a run whose rows are moved to a device and number format; ids stay on the CPU.

    Args:
        run: The run to view.
        like: A tensor with the device and number format of the rows.
    """

    def __init__(self, run: Store, like: Tensor) -> None:
        self._run = run
        self._device, self._dtype = like.device, like.dtype

    @property
    def recipe(self) -> Recipe:
        """How the sketches were made."""
        return self._run.recipe

    def __len__(self) -> int:
        """Return the number of steps."""
        return len(self._run)

    def read(self, position: int) -> Step:
        """Return a step, moved to the device.

        Raises:
            ValueError: If its rows are not finite.
        """
        step = self._run.read(position)
        _require_finite(step, position)
        return replace(
            step,
            weights=step.weights.to(self._device, self._dtype),
            sketch=step.sketch.to(self._device, self._dtype),
            terms=self._move(step.terms),
            curvature=self._move(step.curvature),
            curvature_rows=self._move(step.curvature_rows),
        )

    def facts_at(self, position: int) -> StepFacts:
        """Return the facts of a step without its rows, on the CPU."""
        return self._run.facts_at(position)

    def snapshots(self) -> list[int]:
        """Return the indices of the steps before which a snapshot was taken."""
        return self._run.snapshots()

    def preconditioner(self, position: int = -1) -> Preconditioner | None:
        """Return the coordinates of a step's rows, on the device of the run."""
        return self._run.preconditioner(position)

    def _move(self, tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.to(self._device, self._dtype)


def _require_finite(step: Step, position: int) -> None:
    # A sum is finite only if its terms are, and takes a fraction of the time.
    if isfinite(step.sketch.sum()) or bool(step.sketch.isfinite().all()):
        return
    earlier = f"use the steps before it, `run[:{position}]`, with the weights of that time"
    raise ValueError(
        f"Step {step.index} of the run has gradients that are not finite: the training diverged "
        "there, or a sample holds NaN. Expected finite rows; "
        f"{earlier if position else 'train again'}."
    )
