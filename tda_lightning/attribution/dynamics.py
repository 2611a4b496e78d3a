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
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from tda_lightning.step import Step
from tda_lightning.stores import Store

# Besides all whose names end in W, as AdamW's does.
_DECOUPLED = {"Adafactor", "Lion", "Muon"}


@dataclass(frozen=True)
class Dynamics:
    """What one optimizer step does.

    Attributes:
        rate: Learning rate.
        momentum: Share of the buffer that stays.
        fresh: Share of the gradient that enters the buffer: one less dampening.
        lookahead: Whether momentum is Nesterov's.
        coupled: Weight decay added to the gradient.
        decoupled: Weight decay applied to the weights.
    """

    rate: float
    momentum: float
    fresh: float
    lookahead: bool
    coupled: float
    decoupled: float

    @classmethod
    def of(cls, step: Step) -> Dynamics:
        """Read them off a step, which is taken to be its run's first if its index is 0.

        Where parameter groups differ, the learning rate is the largest, which rows are relative to;
        the rest is the first group's.
        """
        group = step.groups[0]
        decoupled = step.optimizer.endswith("W") or step.optimizer in _DECOUPLED
        coupled = not decoupled and group.eps == 0  # no second moment to divide by
        begins = step.index == 0  # torch fills an empty buffer with the whole gradient
        return cls(
            rate=step.lr,
            momentum=group.beta1 or group.momentum,
            fresh=1 - (group.beta1 or (0.0 if begins else group.dampening)),
            lookahead=bool(group.nesterov),
            coupled=group.weight_decay if coupled else 0.0,
            decoupled=group.weight_decay if decoupled else 0.0,
        )

    @property
    def reach(self) -> float:
        """How far a gradient moves the weights in the end, per unit: the rate of plain descent."""
        own = self.rate * self.lookahead
        return own + self.rate * self._kept * self.fresh / (1 - self.momentum)

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
    def _kept(self) -> float:
        return self.momentum if self.lookahead else 1.0


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


@dataclass(frozen=True)
class Extent:
    """How far a training went.

    Attributes:
        time: Sum of all learning rates, as plain gradient descent would have them.
        weight: What the weights of a step's visits sum to, on average: 1 if losses are means.
    """

    time: float
    weight: float

    @classmethod
    def of(cls, run: Store) -> Extent:
        """Add up the steps of a run."""
        time = weight = 0.0
        for step in run:
            time += run.recipe.every_n_steps * Dynamics.of(step).reach
            weight += float(step.weights.sum()) / len(run)
        return cls(time, weight)
