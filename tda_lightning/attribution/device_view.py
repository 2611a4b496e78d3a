"""Device view: a run whose steps are read onto one device, in one number format."""

from __future__ import annotations

import warnings
from dataclasses import replace
from math import isfinite
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from tda_lightning.attribution.visits import select_visits
from tda_lightning.stores import Store
from tda_lightning.stores.recipe import Recipe
from tda_lightning.stores.step import OPTIONAL_FACTS, Preconditioner, Step, StepFacts


class DeviceView(Store):
    """A view of a run whose rows have the device and format of a tensor; ids stay on the CPU.

    Visits whose rows are not finite are left out, with one warning.
    """

    def __init__(self, run: Store, like: Tensor) -> None:
        self._run = run
        self._device, self._dtype = like.device, like.dtype
        self._left_out: set[tuple[int, int]] = set()  # indices of steps, and samples

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
            ValueError: If its rows are not finite because the training diverged.
        """
        step = self._run.read(position)
        bad = step.non_finite_visits()
        if len(bad) or not isfinite(step.weights.sum()):
            finite = _without_non_finite(step, bad, position)
            self._leave_out(step, bad)
            step = finite
        facts: dict[str, Any] = {n: self._move(getattr(step, n)) for n in OPTIONAL_FACTS}
        return replace(
            step,
            weights=step.weights.to(self._device, self._dtype),
            sketch=step.sketch.to(self._device, self._dtype),
            **facts,
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

    def provenance(self) -> dict[str, str]:
        """Return the provenance of an answer: the visits left out so far, if there are any."""
        if not self._left_out:
            return {}
        first = sorted(self._left_out)[:3]
        shown = [f"sample {sample} at step {index}" for index, sample in first]
        more = ", ..." if len(self._left_out) > 3 else ""
        return {"left out as not finite": f"{len(self._left_out)}: {', '.join(shown)}{more}"}

    def _leave_out(self, step: Step, bad: Int[Tensor, " m"]) -> None:
        if not self._left_out:
            warnings.warn(
                "Left out visits whose gradients are not finite, such as that of sample "
                f"{int(step.sample_ids[bad[0]])} at step {step.index}. Expected finite rows; look "
                "at that sample, or at the loss of that step.",
                stacklevel=2,
            )
        self._left_out |= {(step.index, sample) for sample in step.sample_ids[bad].tolist()}

    def _move(self, tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.to(self._device, self._dtype)


def _without_non_finite(step: Step, bad: Int[Tensor, " m"], position: int) -> Step:
    """Return a step without some visits; an error if the training diverged there."""
    if _has_diverged(step, len(bad)):
        earlier = f"use the steps before it, `run[:{position}]`, with the weights of that time"
        raise ValueError(
            f"Step {step.index} of the run has gradients that are not finite: the training "
            "diverged there, or a sample holds NaN. Expected finite rows; "
            f"{earlier if position else 'train again'}."
        )
    mask = torch.ones(len(step.sample_ids), dtype=torch.bool)
    mask[bad] = False
    curvature = step.curvature_rows
    if curvature is not None:
        curvature = curvature[curvature.isfinite().all(dim=1)]
    return replace(select_visits(step, mask), curvature_rows=curvature)


def _has_diverged(step: Step, n_bad: int) -> bool:
    """Return whether the weights after a step are not finite, as far as the step shows it."""
    if not isfinite(step.weights.sum()):  # They include the scale of the gradient that was used.
        return True
    return n_bad == len(step.sample_ids) and bool(step.weights.any())
