r"""Unlearn by a replay: repeat the end of the training with and without the forgotten samples.

Let :math:`\theta_s` be the weights of a snapshot. :math:`\Delta_s` estimates the displacement that
the forgotten samples had caused until then. :math:`R` and :math:`R_{-F}` are the rest of the
training with and without them. The update is

.. math:: \theta + R_{-F}(\theta_s + \Delta_s) - R(\theta_s)

Both replays start without the optimizer's state, such as momentum. To first order, their difference
does not depend on it. The steps, their samples and their learning rates are those of the run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.optim import Optimizer

from tda_lightning.applications.unlearning.sample_passes import batch_of
from tda_lightning.applications.unlearning.weight_updates import (
    ForgettingTask,
    SecondOrder,
    WeightUpdate,
)
from tda_lightning.attribution.dynamics.optimizer import require_training
from tda_lightning.passes.batches import loss_of, transfer
from tda_lightning.passes.model_state import preserved_state, swapped_weights
from tda_lightning.results.progress import progress_bar
from tda_lightning.stores import Store
from tda_lightning.stores.arguments import describe, require_kind
from tda_lightning.stores.step import StepFacts

StepType = TypeVar("StepType", bound=StepFacts)


@dataclass(frozen=True)
class Replay(WeightUpdate):
    """Repeat the end of the training twice, with and without the forgotten samples.

    It costs twice its share of the training, and needs no uncompressed rows. The run must hold
    every step, and snapshots: ``GradientRecorder(snapshots=n)``. The module must train one
    optimizer by ``training_step`` alone. Clipping is not repeated.

    Attributes:
        share: Share of the training to repeat. It starts at the nearest snapshot.
        before: The update that estimates the effect on the snapshot.
    """

    share: float = 0.25
    before: WeightUpdate = SecondOrder()

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise ValueError(f"`share` is {self.share!r}; expected a number above 0 and up to 1.")
        require_kind("before", self.before, WeightUpdate, "`SecondOrder()`")

    def displacement(self, task: ForgettingTask) -> Float[Tensor, " d"]:
        """Return the difference between both replays.

        Raises:
            ValueError: If the run lacks steps or snapshots, or the module trains otherwise.
        """
        require_training(task.run)
        snapshot, steps = self._rest(task)
        n_before = len(task.run) - len(steps)
        parameters = task.selection.all_parameters()
        displaced = torch.zeros(sum(parameter.numel() for parameter in parameters))
        weights = task.run.weights_at(snapshot)
        if n_before:
            with swapped_weights(task.model, weights):
                displaced = self.before.displacement(replace(task, run=task.run[:n_before]))
        no_ids = torch.empty(0, dtype=torch.int64)
        with_all, without = (
            replayed(task, weights, move, steps, partial(_accumulate, task, without=ids))
            for move, ids in ((torch.zeros_like(displaced), no_ids), (displaced, task.forget_ids))
        )
        return without - with_all

    def _rest(self, task: ForgettingTask) -> tuple[int, list[StepFacts]]:
        """Return the snapshot to start from, and the steps from there on."""
        run = task.run
        require_every_step(run)
        steps = list(run.facts)
        wanted = steps[0].index + round((1 - self.share) * len(steps))
        inside = [index for index in run.snapshots() if steps[0].index <= index <= steps[-1].index]
        if not inside:
            raise ValueError(
                "The run has no snapshots to start from; expected some. Record with "
                "`GradientRecorder(..., snapshots=n)`, or use `SecondOrder()`."
            )
        snapshot = min(inside, key=lambda index: abs(index - wanted))
        return snapshot, [step for step in steps if step.index >= snapshot]


def require_every_step(run: Store) -> None:
    """Check that the run holds every step of the training."""
    if run.recipe.every_n_steps != 1:
        raise ValueError(
            f"The run holds one of every {run.recipe.every_n_steps} steps; expected every "
            "step, to repeat them. Record with `every_n_steps=1`, or use `SecondOrder()`."
        )


def replayed(
    task: ForgettingTask,
    weights: Mapping[str, Tensor],
    displacement: Float[Tensor, " d"],
    steps: Sequence[StepType],
    accumulate: Callable[[StepType], bool],
) -> Float[Tensor, " d"]:
    """Return the parameters after some steps from displaced weights.

    ``accumulate`` sets the gradients of a step, and returns whether there are any.
    """
    model, parameters = task.model, task.selection.all_parameters()
    with _training(model, weights):
        _move_(parameters, displacement)
        optimizer = _optimizer_of(model)
        _require_groups(optimizer, steps[0])
        torch.manual_seed(0)  # Dropout and augmentation are the same in both replays.
        for step in progress_bar(steps, "replay", "step", shown=task.progress):
            optimizer.zero_grad()
            if accumulate(step):
                for group, recorded in zip(optimizer.param_groups, step.groups, strict=True):
                    group["lr"] = recorded.lr
                optimizer.step()
        return torch.cat([parameter.detach().flatten() for parameter in parameters]).clone()


def _accumulate(task: ForgettingTask, step: StepFacts, *, without: Int[Tensor, " n"]) -> bool:
    """Compute the gradient of a step's batch without some samples."""
    ids = step.sample_ids[~torch.isin(step.sample_ids, without)]
    if len(ids):
        batch = batch_of(task.train_loader, ids)
        torch.autograd.backward(loss_of(task.model, transfer(task.model, batch)))
    return bool(len(ids))


@contextmanager
def _training(model: nn.Module, weights: Mapping[str, Tensor]) -> Iterator[None]:
    """Load weights and put the model in training mode; restore everything afterwards."""
    gradients = [parameter.grad for parameter in model.parameters()]
    with swapped_weights(model, weights), preserved_state(model, "train"), torch.enable_grad():
        try:
            yield
        finally:
            for parameter, gradient in zip(model.parameters(), gradients, strict=True):
                parameter.grad = gradient


@torch.no_grad()
def _move_(parameters: Sequence[nn.Parameter], displacement: Float[Tensor, " d"]) -> None:
    parts = torch.split(displacement, [parameter.numel() for parameter in parameters])
    for parameter, part in zip(parameters, parts, strict=True):
        parameter.add_(part.view_as(parameter).to(parameter))


def _optimizer_of(model: Any) -> Optimizer:
    """Return a new optimizer of a module that trains only one."""
    configured = model.configure_optimizers()
    if isinstance(configured, Mapping):
        configured = configured.get("optimizer")
    while isinstance(configured, list | tuple) and configured:
        configured = configured[0] if _is_only(configured) else None
    if not isinstance(configured, Optimizer) or not getattr(model, "automatic_optimization", True):
        raise ValueError(
            f"`{type(model).__name__}` trains by hand, or its `configure_optimizers` returned "
            f"{describe(configured)}; expected one optimizer in automatic optimization. Use "
            "`SecondOrder()`."
        )
    return configured


def _require_groups(optimizer: Optimizer, step: StepFacts) -> None:
    if len(optimizer.param_groups) != len(step.groups):
        raise ValueError(
            f"`configure_optimizers` returned {len(optimizer.param_groups)} parameter groups, and "
            f"step {step.index} of the run holds {len(step.groups)}; expected those of the "
            "training. Pass the module as it was trained, or use `SecondOrder()`."
        )


def _is_only(configured: Sequence[Any]) -> bool:
    """Return whether it is one optimizer, or a list of one with a list of schedulers."""
    first = configured[0]
    is_pair_of_lists = len(configured) == 2 and isinstance(first, list | tuple)
    return len(configured) == 1 or is_pair_of_lists
