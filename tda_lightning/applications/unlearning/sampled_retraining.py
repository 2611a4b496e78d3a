r"""Unlearn by sampled retraining: repeat the training without the samples, on part of each batch.

The retrained weights :math:`\theta'_t` start where the training did. The gradient of each step is
estimated from the recorded gradients :math:`g_i` of the remaining samples :math:`R`, and from new
ones of a random part :math:`P` of them. With probabilities :math:`p_i` of being in it,

.. math:: \sum_{i \in R} g_i(\theta_t)
   + \sum_{i \in P} \frac{g_i(\theta'_t) - g_i(\theta_t)}{p_i}

Its mean is the gradient of retraining, and it is exact as long as the weights are. Johnson & Zhang
(2013), "Accelerating Stochastic Gradient Descent using Predictive Variance Reduction", eq. 1.
Samples with a large gradient are drawn more often. Recorded gradients also serve Wu et al. (2020),
"DeltaGrad: Rapid Retraining of Machine Learning Models", which extrapolates them instead.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tda_lightning.applications.unlearning.replay import replayed, require_every_step
from tda_lightning.applications.unlearning.sample_passes import batch_of
from tda_lightning.applications.unlearning.weight_updates import (
    ForgettingTask,
    WeightUpdate,
    require_uncompressed,
)
from tda_lightning.attribution.dynamics.optimizer import require_training
from tda_lightning.full_influence.full_gradients import FullGradients
from tda_lightning.stores import Store
from tda_lightning.stores.step import Step

# Part of the probability of being drawn that does not depend on the gradient.
_UNIFORM = 0.1
# Largest relative error with which the run must reproduce itself.
_TOLERANCE = 0.05


@dataclass(frozen=True)
class SampledRetraining(WeightUpdate):
    """Repeat the training without the forgotten samples, with gradients of part of each batch.

    It is the closest to a retrained model. The run must hold every step, uncompressed rows of all
    parameters, and the first weights: ``GradientRecorder(projector=Identity(), snapshots=1)``. The
    module must train one optimizer by ``training_step`` alone, and have the same gradients in
    evaluation mode: no dropout, batch norm or augmentation. Clipping is that of the recorded
    training.

    Attributes:
        share: Share of the gradients to compute at the new weights; 1 is exact.
        seed: Seed of the draws.
    """

    share: float = 0.5
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise ValueError(f"`share` is {self.share!r}; expected a number above 0 and up to 1.")

    def displacement(self, task: ForgettingTask) -> Float[Tensor, " d"]:
        """Return the difference between both trainings, with and without the samples.

        Raises:
            ValueError: If the run lacks what is needed, or does not reproduce itself.
        """
        _require_complete(task.run)
        weights = task.run.weights_at(task.run.facts[0].index)
        parameters = task.selection.all_parameters()
        end = torch.cat([parameter.detach().flatten() for parameter in parameters]).clone()
        names = {id(parameter): name for name, parameter in task.model.named_parameters()}
        start = torch.cat([weights[names[id(parameter)]].flatten() for parameter in parameters])
        nowhere, no_ids = torch.zeros_like(end), task.forget_ids[:0]
        with_all = replayed(task, weights, nowhere, task.run, _Gradients(task, no_ids, self))
        _require_small(with_all - end, end - start.to(end), "weights after the last step")
        gradients = _Gradients(task, task.forget_ids, self)
        return replayed(task, weights, nowhere, task.run, gradients) - with_all


class _Gradients:
    """Sets the estimated gradients of one step after the other, without some samples."""

    def __init__(
        self, task: ForgettingTask, forget_ids: Int[Tensor, " n"], update: SampledRetraining
    ) -> None:
        self._task, self._forget_ids, self._share = task, forget_ids, update.share
        self._full = FullGradients.at_current_weights(task.model, task.selection, task.run)
        self._chance = torch.Generator().manual_seed(update.seed)
        self._position = 0

    def __call__(self, step: Step) -> bool:
        remains = ~torch.isin(step.sample_ids, self._forget_ids) & (step.weights != 0)
        ids, weights = step.sample_ids[remains], step.weights[remains]
        recorded = self._full.recorded(step, self._position)[remains]
        gradient = recorded.sum(dim=0)
        if len(self._forget_ids) and len(ids):
            gradient += self._correction(ids, weights.to(recorded), recorded)
        if self._task.run.recipe.reduction == "mean":
            gradient *= float(step.weights.sum() / weights.sum())
        self._position += 1
        parameters = self._task.selection.all_parameters()
        parts = torch.split(gradient, [parameter.numel() for parameter in parameters])
        for parameter, part in zip(parameters, parts, strict=True):
            parameter.grad = part.view_as(parameter).to(parameter)
        return bool(len(ids))

    def _correction(
        self,
        ids: Int[Tensor, " n"],
        weights: Float[Tensor, " n"],
        recorded: Float[Tensor, "n d"],
    ) -> Float[Tensor, " d"]:
        """Return the estimated change of the summed gradients from the recorded weights."""
        p = inclusion_probabilities(recorded.norm(dim=1).cpu().double(), self._share)
        drawn = (torch.rand(len(p), generator=self._chance) < p).nonzero()[:, 0]
        if not len(drawn):
            return torch.zeros_like(recorded[0])
        # A batch of the dataset is in the order of the ids.
        distinct, rows = torch.unique(ids[drawn], return_inverse=True)
        new = self._full.of_samples(batch_of(self._task.train_loader, distinct))[rows]
        changes = weights[drawn, None] * new - recorded[drawn]
        if self._position == 0:
            _require_small(changes, recorded[drawn], "gradients of the first step")
        return (changes / p[drawn, None].to(changes)).sum(dim=0)


def inclusion_probabilities(norms: Float[Tensor, " n"], share: float) -> Float[Tensor, " n"]:
    """Return probabilities that grow with the norms of the gradients, and whose mean is ``share``.

    >>> import torch
    >>> inclusion_probabilities(torch.tensor([9.0, 1.0, 1.0, 1.0]), share=0.5)
    tensor([1.0000, 0.3333, 0.3333, 0.3333])
    """
    n = len(norms)
    sizes = (1 - _UNIFORM) * norms / norms.sum().clamp_min(1e-30) + _UNIFORM / n
    certain = torch.zeros(n, dtype=torch.bool)
    while True:  # At least one more sample becomes certain, each time.
        left = (share * n - certain.sum()).clamp_min(0)
        p = torch.where(certain, 1.0, left * sizes / sizes[~certain].sum().clamp_min(1e-30))
        if not (p > 1).any():
            return p.to(norms)
        certain |= p >= 1


def _require_complete(run: Store) -> None:
    require_uncompressed(run)
    require_training(run)
    require_every_step(run)
    if run.recipe.left_out:
        raise ValueError(
            f"The run did not record the parameters of `{run.recipe.left_out[0].name}`; expected "
            "those of all trained layers, to repeat the training. Use `Replay()`."
        )
    if run.facts[0].index not in run.snapshots():
        raise ValueError(
            "The run lacks the first weights; expected a snapshot before its first step. Record "
            "with `GradientRecorder(..., snapshots=1)`, or use `UnrolledUpdate()`."
        )


def _require_small(error: Tensor, whole: Tensor, name: str) -> None:
    share = float(error.norm() / whole.norm().clamp_min(1e-30))
    if not share <= _TOLERANCE:
        raise ValueError(
            f"The {name} are not those of the run: they differ by {share:.0%}. Expected a training "
            "that can be repeated: the same model, data and optimizer, without dropout, batch norm "
            "or augmentation. Use `Replay()`."
        )
