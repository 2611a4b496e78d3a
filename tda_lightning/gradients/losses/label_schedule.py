r"""LabelSchedule: at which steps labels are sampled, and with which weight.

The curvature of a step's batch, :math:`H_t`, costs one more backward pass. With a share
:math:`p < 1`, only some steps pay for it. A step that is drawn stands for :math:`1 / p` steps:

.. math:: \hat H_t = \frac{m_t}{p} H_t, \qquad m_t \in \{0, 1\}, \qquad \mathbb{E}[m_t] = p

so that sums over steps are unbiased. Draws are systematic within blocks of about :math:`1 / p`
steps, with a random start for each block. So they are spread evenly over the training, and do not
follow a period of the data. Which steps are drawn depends on their numbers alone: a resumed
training draws the same ones, and so do all processes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from random import Random

from tda_lightning.stores.step import FIRST_LABELLED_STEPS


@dataclass(frozen=True)
class LabelSchedule:
    """Draws the steps at which labels are sampled.

    Attributes:
        share: Share of the steps after the first :data:`FIRST_LABELLED_STEPS`, which are all drawn.
    """

    share: float

    def weight(self, number: int) -> float:
        """Return the weight of the curvature of a recorded step, 0 if no labels are sampled.

        Args:
            number: Number of steps recorded before.

        >>> [LabelSchedule(0.25).weight(number) for number in range(19, 28)]
        [1.0, 4.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 4.0]
        """
        if number < FIRST_LABELLED_STEPS:
            return 1.0
        p = self.share
        block, place = divmod(number - FIRST_LABELLED_STEPS, max(1, round(1 / p)))
        start = Random(block).random()
        is_drawn = math.floor(start + (place + 1) * p) > math.floor(start + place * p)
        return is_drawn / p

    def mean_share(self, steps: float) -> float:
        """Return the expected share of a training's recorded steps at which labels are sampled.

        Args:
            steps: Number of recorded steps, which may be infinite.
        """
        complete = FIRST_LABELLED_STEPS / max(steps, FIRST_LABELLED_STEPS)
        return complete + (1 - complete) * self.share


EVERY_STEP = LabelSchedule(1.0)
