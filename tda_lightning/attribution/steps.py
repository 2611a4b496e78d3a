"""Steps as methods read them: on one device, without visits that are not finite, or rescaled.

If labels were sampled at a share of the steps, each of these stands for several, and its rows are
scaled up. The curvature of one small batch is too noisy for that: a step would remove all of a
displacement in the few directions of its batch, and nothing elsewhere. Curvature changes slowly, so
:func:`steps_backward` takes the mean over the next such steps. It has the same expectation, and
less noise.
"""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Iterator
from dataclasses import replace
from math import isfinite
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tda_lightning.stores import Store
from tda_lightning.stores.step import FIRST_LABELLED_STEPS, OPTIONAL_FACTS, Step
from tda_lightning.stores.store import StoreSlice


class DeviceView(StoreSlice):
    """A view of a run whose rows have the device and format of a tensor; ids stay on the CPU.

    Visits whose rows are not finite are left out, with one warning.
    """

    def __init__(self, run: Store, like: Tensor) -> None:
        super().__init__(run, range(len(run)))
        self._device, self._dtype = like.device, like.dtype
        self._left_out: set[tuple[int, int]] = set()  # indices of steps, and samples

    def read(self, position: int) -> Step:
        """Return a step, moved to the device.

        Raises:
            ValueError: If its rows are not finite because the training diverged.
        """
        step = super().read(position)
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


def unweighted(step: Step) -> Step:
    """Return the step with each visit at weight 1: its row is the gradient of its sample's loss."""
    rows = step.sketch / step.weights.clamp_min(1e-30)[:, None]
    return replace(step, sketch=rows, weights=torch.ones_like(step.weights))


def last_visits(run: Store) -> Iterator[Step]:
    """Yield the steps, last to first, each with only the visits that are their sample's last.

    A sample that occurs several times in its last step keeps all of these visits.
    """
    seen: set[int] = set()
    for step in reversed(run):
        ids = step.sample_ids.tolist()
        yield select_visits(step, torch.tensor([i not in seen for i in ids], dtype=torch.bool))
        seen.update(ids)


def last_gradients(run: Store, train_ids: Int[Tensor, " n_train"]) -> Float[Tensor, "n_train k"]:
    """Return each training sample's gradient at its last visit; zero if it was never drawn."""
    gradients = torch.zeros(0)
    for step in map(unweighted, last_visits(run)):
        if not len(gradients):
            gradients = step.sketch.new_zeros(len(train_ids), step.sketch.shape[1])
        positions = torch.searchsorted(train_ids, step.sample_ids)
        gradients[positions.to(gradients.device)] = step.sketch
    return gradients


def last_epoch(run: Store) -> Store:
    """Return the steps of the last recorded epoch."""
    epoch = run.facts[-1].epoch
    backwards = range(len(run) - 1, -1, -1)
    return run[next((at for at in backwards if run.facts[at].epoch != epoch), -1) + 1 :]


def select_visits(step: Step, mask: Bool[Tensor, " n"]) -> Step:
    """Return the step with the visits that a mask on the CPU selects."""
    device_mask = mask.to(step.sketch.device)
    known = {name: fact for name in OPTIONAL_FACTS if (fact := getattr(step, name)) is not None}
    return replace(
        step,
        sample_ids=step.sample_ids[mask],
        weights=step.weights[device_mask],
        sketch=step.sketch[device_mask],
        **{name: fact[device_mask] for name, fact in known.items()},
    )


# Steps are averaged until they have this many rows: enough for small batches, and few enough for
# the eigendecomposition of their products.
_N_ROWS = 256


def steps_backward(run: Store) -> Iterator[Step]:
    """Yield the steps, last to first, with averaged rows of sampled labels where few have any.

    The rows of the first steps stay as they are: all of these have labels.
    """
    window: deque[Tensor] = deque()
    is_share = False
    for number, step in zip(range(len(run) - 1, -1, -1), reversed(run), strict=True):
        rows = step.curvature_rows
        if rows is None or number < FIRST_LABELLED_STEPS:
            yield step
            continue
        is_share |= len(rows) == 0
        if is_share and len(rows):
            window.append(rows)
            while sum(map(len, window)) - len(window[0]) >= _N_ROWS:
                window.popleft()
            step = replace(step, curvature_rows=torch.cat(list(window)) / len(window) ** 0.5)
        yield step
