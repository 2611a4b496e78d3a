r"""Optimizer dynamics: the update of an optimizer step, as a linear recursion.

SGD, with momentum :math:`\mu`, dampening :math:`\tau`, coupled decay :math:`\kappa`, and
decoupled decay :math:`\delta`, updates a buffer :math:`b` and the weights :math:`\theta` from the
gradient :math:`g`:

.. math:: b \leftarrow \mu b + (1 - \tau)(g + \kappa \theta), \qquad
   \theta \leftarrow (1 - \eta \delta) \theta - \eta b

(Nesterov: :math:`g + \kappa \theta + \mu b` in place of :math:`b`).

**Adam-like optimizers** follow the same recursion in the coordinates in which their rows are
recorded. There the second moment drops out, and the decay :math:`\beta_1` of the first moment is
momentum with equal dampening, :math:`\mu = \tau = \beta_1`. This only delays gradients. But an
average over :math:`1 / (1 - \beta_1)` steps overshoots at far larger rates than a single step:
without it, scores of short trainings at high rates were much worse. Two parts are left out. The
bias correction of the first moment made no measurable difference. Coupled decay is divided by the
second moment, so it is small where gradients are not.

**Parameter groups** that differ are treated as one, with the mean of their settings over the
recorded parameters. A sketch row mixes all of them. The error was measured against decay applied
group by group, on unsketched rows of a small MLP over 200 steps. Without decay on biases and norms,
scores were off by 3 % if the other groups decayed at .3. At .01 or less, they were off by at most
2 %. Without decay on a whole layer, they were off by 13 to 19 % at .3, 7 % at .05 and 2 % at .01. A
mean of momentum is a rougher approximation, and methods warn about it.

**Several optimizers** take turns. Each moves only the parameters that it trains, and has a separate
momentum buffer. Its decay is averaged over all recorded parameters, so the decay of a full round of
turns is right on average.
"""

from __future__ import annotations

import operator
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

from tda_lightning.stores import Store
from tda_lightning.stores.step import ParameterGroup, StepFacts

# Optimizers with decoupled weight decay, besides all whose names end in W, such as AdamW.
_DECOUPLED_DECAY = {"Adafactor", "Lion", "Muon"}
# Optimizers that take gradient steps: in the coordinates of the parameters, or in recorded ones.
_PLAIN = {"SGD", "SGDW", "ASGD"}
_ADAPTIVE = {"Adam", "AdamW", "NAdam", "RAdam", "RMSprop", "Adagrad"}
# Among this many last steps, optimizers that take turns have all had one.
_N_LAST_STEPS = 16

_OptimizerGroups = set[tuple[str, tuple[ParameterGroup, ...]]]


@dataclass(frozen=True)
class Dynamics:
    r"""The coefficients of one optimizer step.

    Attributes:
        lr: Learning rate, :math:`\eta`.
        momentum: Share of the buffer that is carried over, :math:`\mu`.
        gradient_share: Share of the gradient that enters the buffer, :math:`1 - \tau`.
        nesterov: Share of the parameters with Nesterov's momentum.
        coupled_decay: Weight decay added to the gradient, :math:`\kappa`.
        decoupled_decay: Weight decay applied to the weights, :math:`\delta`.
        owner: Identifies the momentum buffer among those of several optimizers.
    """

    lr: float
    momentum: float
    gradient_share: float
    nesterov: float
    coupled_decay: float
    decoupled_decay: float
    owner: float = 0.0

    @classmethod
    def of(cls, step: StepFacts) -> Dynamics:
        """Derive the coefficients of a step; index 0 marks the first step of its run.

        Where parameter groups differ, the learning rate is the largest, to which rows are relative.
        All else is the mean over the recorded parameters. Parameters that the step's optimizer does
        not train do not decay in it.
        """
        held = sum(group.share for group in step.groups)
        shares = [group.share / held if held else 1 / len(step.groups) for group in step.groups]
        settings = zip(*(_group_settings(step, group) for group in step.groups), strict=True)
        means = (sum(map(operator.mul, shares, values)) for values in settings)
        momentum, gradient_share, nesterov, coupled_decay, decoupled_decay = means
        return cls(
            lr=step.lr,
            momentum=momentum,
            gradient_share=gradient_share,
            nesterov=nesterov,
            coupled_decay=(held or 1.0) * coupled_decay,
            decoupled_decay=(held or 1.0) * decoupled_decay,
            owner=step.groups[0].owner,
        )

    @property
    def effective_lr(self) -> float:
        r"""Rate at which plain gradient descent would move the weights as far in the end.

        Without Nesterov's momentum, :math:`\eta (1 - \tau) / (1 - \mu)`. Overshoot is judged by it.
        """
        direct = self.lr * self.nesterov
        buffered = self.lr * self.buffer_coefficient * self.gradient_share
        return direct + buffered / (1 - self.momentum)

    @property
    def decay(self) -> float:
        """Weight decay of either kind."""
        return self.coupled_decay + self.decoupled_decay

    @property
    def buffer_coefficient(self) -> float:
        r"""Coefficient of the buffer in the update: 1, or :math:`\mu` with Nesterov's momentum."""
        return 1 - self.nesterov * (1 - self.momentum)


def _group_settings(
    step: StepFacts, group: ParameterGroup
) -> tuple[float, float, float, float, float]:
    """Return momentum, gradient share, Nesterov, coupled and decoupled decay of a group."""
    is_decoupled = (
        group.decoupled or step.optimizer.endswith("W") or step.optimizer in _DECOUPLED_DECAY
    )
    is_coupled = not is_decoupled and group.eps == 0  # no second moment to divide by
    is_first = step.index == 0  # torch fills an empty buffer with the whole gradient
    # Rows, and the step's rate, are relative to the largest rate of all groups.
    decay = group.weight_decay * (group.lr / step.lr if step.lr else 1.0)
    return (
        group.beta1 or group.momentum,
        1 - (group.beta1 or (0.0 if is_first else group.dampening)),
        group.nesterov,
        decay if is_coupled else 0.0,
        decay if is_decoupled else 0.0,
    )


def require_training(run: Store) -> None:
    """Check that the steps of a run are training steps."""
    if not run.recipe.is_training:
        raise ValueError(
            "The run was recorded without training: its steps did not move the weights, so they "
            "had no effect. Expected the run of a training; pass this one as "
            "`InfluenceFunction(curvature_from=...)` or `rows_from=`, or compare gradients with "
            "`GradientSimilarity()`."
        )


def has_plain_rates(run: Store) -> bool:
    """Return whether the steps of a run are gradient steps in the coordinates of its rows.

    Only then does a step remove learning rate times curvature of a displacement. This is known for
    SGD, and for adaptive optimizers whose coordinates were recorded. The last steps decide.
    """
    return not _unsupported_optimizers(run, _last_optimizers(run))


def warn_of_approximations(run: Store) -> None:
    """Warn if a linear recursion only approximates the last steps of a run.

    Methods that use learning rates and curvature call this once.
    """
    last = _last_optimizers(run)
    unsupported = _unsupported_optimizers(run, last)
    if unsupported:
        warnings.warn(
            f"Steps of {' and '.join(unsupported)} are not known to be gradient steps in the "
            "coordinates of this run's rows. Learning rate times curvature then does not describe "
            "their effect: expect wrong scales and less accurate rankings. Record with "
            f"`preconditioner='optimizer'` under {', '.join(sorted(_ADAPTIVE))}. Under other "
            "optimizers, use `TracIn()` or `GradientSimilarity()`, which use no curvature.",
            stacklevel=2,
        )
    mixed = sorted({name for name, groups in last if not _have_one_momentum(groups)})
    if mixed:
        warnings.warn(
            f"The parameter groups of {' and '.join(mixed)} differ in momentum, but rows mix all "
            "parameters: the mean over the parameters is used, and scores are less accurate. "
            "Expected the same momentum (`dampening`, `nesterov`, `betas[0]`) in all groups. Train "
            "with one momentum, or use `TracIn()`, which ignores it.",
            stacklevel=2,
        )


def _last_optimizers(run: Store) -> _OptimizerGroups:
    """Return the optimizers of the last steps, with the groups that hold recorded parameters."""
    return {
        (step.optimizer, tuple(group for group in step.groups if group.share) or step.groups)
        for step in run.facts[-_N_LAST_STEPS:]
    }


def _unsupported_optimizers(run: Store, last: _OptimizerGroups) -> list[str]:
    """Return the names of optimizers whose steps are not known to be gradient steps."""
    by_name = _PLAIN | (_ADAPTIVE if run.recipe.preconditioner == "optimizer" else set())
    recorded = {name for name, groups in last if all(group.descent for group in groups)}
    older = {name for name, groups in last if not any(group.share for group in groups)}
    # Older versions did not record it, but had coordinates only for optimizers they supported.
    if older and run.preconditioner() is not None:
        recorded |= older
    return sorted({name for name, _ in last} - by_name - recorded)


def _have_one_momentum(groups: Sequence[ParameterGroup]) -> bool:
    kinds = {(group.beta1 or group.momentum, group.dampening, group.nesterov) for group in groups}
    return len(kinds) == 1


@dataclass(frozen=True)
class Extent:
    """Totals over the steps of a training.

    Attributes:
        total_lr: Sum of the effective learning rates, those of equivalent plain gradient descent.
        weight: Mean over the steps of the sum of their visits' weights: 1 if losses are means.
        decay: Weight decay of either kind, per unit of ``total_lr``, on average.
    """

    total_lr: float
    weight: float
    decay: float

    @classmethod
    def of(cls, run: Store) -> Extent:
        """Sum over the steps of a run."""
        total_lr = weight = total_decay = 0.0
        for step in run.facts:
            dynamics = Dynamics.of(step)
            total_lr += run.recipe.every_n_steps * dynamics.effective_lr
            weight += float(step.weights.sum()) / len(run)
            # Decoupled decay does not pass through the momentum buffer.
            coupled = dynamics.effective_lr * dynamics.coupled_decay
            decoupled = dynamics.lr * dynamics.decoupled_decay
            total_decay += run.recipe.every_n_steps * (coupled + decoupled)
        return cls(total_lr, weight, total_decay / total_lr if total_lr else 0.0)
