r"""Dynamics: what an optimizer does with a gradient, as a linear recursion.

SGD, with momentum :math:`\mu`, dampening :math:`\tau`, coupled decay :math:`\kappa`, and
decoupled decay :math:`\delta`, takes the gradient :math:`g`, a buffer :math:`b` and the weights
:math:`\theta` to

.. math:: b \leftarrow \mu b + (1 - \tau)(g + \kappa \theta), \qquad
   \theta \leftarrow (1 - \eta \delta) \theta - \eta b

(Nesterov: :math:`g + \kappa \theta + \mu b` in place of :math:`b`).

Adam-like optimizers are the same in the coordinates in which the rows of their runs are recorded:
there the second moment is gone, and the decay :math:`\beta_1` of the first is momentum with as much
dampening, :math:`\mu = \tau = \beta_1`. It only delays, but what is averaged over
:math:`1 / (1 - \beta_1)` steps overshoots far later than each of them would: without it, scores of
short trainings at high rates were much worse. Left out are the correction of the first moment's
bias, which makes no difference that was measured, and coupled decay, which is divided by the second
moment and then small where gradients are not.

**Parameter groups** that differ are taken for one, with the mean of their settings over the
recorded parameters: a sketch row mixes all of them. Measured against decay group by group, on whole
rows of a small MLP over 200 steps: with no decay on biases and norms, scores were off by 3 % where
the others' was .3, and by 2 % at most where it was .01 or less; with none on a whole layer, by 13
to 19 % at .3, 7 % at .05, 2 % at .01. Means of momentum are rougher, and methods warn of them.

**Several optimizers** take turns, and each moves only what it trains, with a momentum of its own.
Its decay is spread over all recorded parameters, so that what each of them decays in a round of
turns is right on average.
"""

from __future__ import annotations

import math
import operator
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

from tda_lightning.stores import Store
from tda_lightning.stores.step import ParameterGroup, StepFacts

# Besides all whose names end in W, as AdamW's does.
_DECOUPLED = {"Adafactor", "Lion", "Muon"}
# What takes gradient steps: in the coordinates of the gradients, and in those that are recorded.
_DESCENDING = {"SGD", "SGDW", "ASGD"}
_ADAPTIVE = {"Adam", "AdamW", "NAdam", "RAdam", "RMSprop", "Adagrad"}
# Optimizers that take turns have all had one in so many steps.
_TURNS = 16

_Last = set[tuple[str, tuple[ParameterGroup, ...]]]


@dataclass(frozen=True)
class Dynamics:
    """What one optimizer step does.

    Attributes:
        rate: Learning rate.
        momentum: Share of the buffer that stays.
        fresh: Share of the gradient that enters the buffer: one less dampening.
        lookahead: Share of the parameters whose momentum is Nesterov's.
        coupled: Weight decay added to the gradient.
        decoupled: Weight decay applied to the weights.
        owner: Whose momentum buffer it is, among several optimizers.
    """

    rate: float
    momentum: float
    fresh: float
    lookahead: float
    coupled: float
    decoupled: float
    owner: float = 0.0

    @classmethod
    def of(cls, step: StepFacts) -> Dynamics:
        """Read them off a step, which is taken to be its run's first if its index is 0.

        Where parameter groups differ, the learning rate is the largest, which rows are relative to;
        the rest is the mean over the recorded parameters. Those that the step's optimizer does not
        train do not decay in it.
        """
        held = sum(group.share for group in step.groups)
        shares = [group.share / held if held else 1 / len(step.groups) for group in step.groups]
        each = zip(*(_of_group(step, group) for group in step.groups), strict=True)
        means = (sum(map(operator.mul, shares, values)) for values in each)
        momentum, fresh, lookahead, coupled, decoupled = means
        return cls(
            rate=step.lr,
            momentum=momentum,
            fresh=fresh,
            lookahead=lookahead,
            coupled=(held or 1.0) * coupled,
            decoupled=(held or 1.0) * decoupled,
            owner=step.groups[0].owner,
        )

    @property
    def effective_lr(self) -> float:
        """How far a gradient moves the weights in the end, per unit: the rate of plain descent."""
        own = self.rate * self.lookahead
        return own + self.rate * self.kept * self.fresh / (1 - self.momentum)

    @property
    def brisk_rate(self) -> float:
        r"""The rate to judge overshoot by, :math:`\eta (1 - \tau) / \sqrt{1 - \mu}`.

        Momentum answers a step's curvature again and again, so it must be milder to be harmless.
        """
        return self.rate * self.fresh / math.sqrt(1 - self.momentum)

    @property
    def decay(self) -> float:
        """Weight decay of either kind."""
        return self.coupled + self.decoupled

    @property
    def kept(self) -> float:
        """Share of the gradient's part in the buffer that the step itself applies."""
        return 1 - self.lookahead * (1 - self.momentum)


def _of_group(step: StepFacts, group: ParameterGroup) -> tuple[float, float, float, float, float]:
    """Return momentum, fresh, lookahead, coupled and decoupled decay of a parameter group."""
    is_decoupled = group.decoupled or step.optimizer.endswith("W") or step.optimizer in _DECOUPLED
    is_coupled = not is_decoupled and group.eps == 0  # no second moment to divide by
    begins = step.index == 0  # torch fills an empty buffer with the whole gradient
    # Rows, and the step's rate, are relative to the largest of the rates.
    decay = group.weight_decay * (group.lr / step.lr if step.lr else 1.0)
    return (
        group.beta1 or group.momentum,
        1 - (group.beta1 or (0.0 if begins else group.dampening)),
        group.nesterov,
        decay if is_coupled else 0.0,
        decay if is_decoupled else 0.0,
    )


def require_training(run: Store) -> None:
    """Raise unless the steps of a run moved the weights.

    Raises:
        ValueError: If it is a pass that was recorded without training.
    """
    if not run.recipe.is_training:
        raise ValueError(
            "The run is a pass that was recorded without training: its steps moved nothing, and "
            "what followed from them cannot be asked. Expected the run of a training; give the "
            "pass to `InfluenceFunction(curvature_from=...)` or `rows_from=`, or compare gradients "
            "with `GradientSimilarity()`."
        )


def has_plain_rates(run: Store) -> bool:
    """Say whether the steps of a run are gradient steps in the coordinates of its rows.

    Only then is learning rate times curvature what a step takes away of a displacement. It is known
    of SGD, and of adaptive optimizers whose coordinates were recorded; the last steps tell.
    """
    return not _strangers(run, _last_of(run))


def warn_of_approximations(run: Store) -> None:
    """Warn of what the last steps of a run did that a linear recursion only approximates.

    To be called once by a method that derives something from learning rates and curvature.
    """
    last = _last_of(run)
    strangers = _strangers(run, last)
    if strangers:
        warnings.warn(
            f"Steps of {' and '.join(strangers)} are not known to be gradient steps in the "
            "coordinates of this run's rows, so that learning rate times curvature is not what "
            "they take away: expect wrong scales and less accurate rankings. Record with "
            f"`preconditioner='optimizer'` under {', '.join(sorted(_ADAPTIVE))}; under others, ask "
            "`TracIn()` or `GradientSimilarity()`, which use no curvature.",
            stacklevel=2,
        )
    unlike = sorted({name for name, groups in last if not _are_alike(groups)})
    if unlike:
        warnings.warn(
            f"The parameter groups of {' and '.join(unlike)} differ in momentum, which rows cannot "
            "follow, since they mix all parameters: its mean over the parameters is used, and "
            "scores are less accurate. Expected one momentum (`dampening`, `nesterov`, "
            "`betas[0]`) in all groups. Train with one, or ask `TracIn()`, which knows of none.",
            stacklevel=2,
        )


def _last_of(run: Store) -> _Last:
    """Return the optimizers of the last steps, with the groups that hold recorded parameters."""
    return {
        (step.optimizer, tuple(one for one in step.groups if one.share) or step.groups)
        for step in run.facts[-_TURNS:]
    }


def _strangers(run: Store, last: _Last) -> list[str]:
    names = _DESCENDING | (_ADAPTIVE if run.recipe.preconditioner == "optimizer" else set())
    told = {name for name, groups in last if all(group.descent for group in groups)}
    older = {name for name, groups in last if not any(group.share for group in groups)}
    if older and run.preconditioner() is not None:  # of those they knew, whatever their names
        told |= older
    return sorted({name for name, _ in last} - names - told)


def _are_alike(groups: Sequence[ParameterGroup]) -> bool:
    kinds = {(one.beta1 or one.momentum, one.dampening, one.nesterov) for one in groups}
    return len(kinds) == 1


@dataclass(frozen=True)
class Extent:
    """How far a training went.

    Attributes:
        time: Sum of all learning rates, as plain gradient descent would have them.
        weight: What the weights of a step's visits sum to, on average: 1 if losses are means.
        decay: Weight decay of either kind, per unit of that time, on average.
    """

    time: float
    weight: float
    decay: float

    @classmethod
    def of(cls, run: Store) -> Extent:
        """Add up the steps of a run."""
        time = weight = decayed = 0.0
        for step in run.facts:
            dynamics = Dynamics.of(step)
            time += run.recipe.every_n_steps * dynamics.effective_lr
            weight += float(step.weights.sum()) / len(run)
            # Decoupled decay does not pass through the momentum buffer.
            own = dynamics.effective_lr * dynamics.coupled + dynamics.rate * dynamics.decoupled
            decayed += run.recipe.every_n_steps * own
        return cls(time, weight, decayed / time if time else 0.0)
