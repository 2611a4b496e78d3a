r"""TracIn: how much did the visits of a training sample push the query's loss down?

.. math:: s(q, i) = \sum_{t \,:\, i \in B_t} \eta_t \, \langle g_q, g_i^{(t)} \rangle

Pruthi et al. (2020), "Estimating Training Data Influence by Tracing Gradient Descent", eq. 1. Rows
are as-applied contributions, so :math:`g_i^{(t)}` holds the sample's weight in its batch. The
query's gradient is the one at the weights given, for every step.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from tda_lightning.attribution.attributor import SelfAttributor
from tda_lightning.linalg import squared_norms
from tda_lightning.step import Step
from tda_lightning.stores import Store


@dataclass(frozen=True)
class TracIn(SelfAttributor):
    """Sum over steps of learning rate times inner product with the query's gradient.

    With a stride, each recorded step stands for the ones in between.
    """

    def directions(
        self, run: Store, queries: Float[Tensor, "n_query k"]
    ) -> Iterator[tuple[Step, Float[Tensor, "n_query k"]]]:
        """Look for the query's gradient, as far as the step went."""
        for step in run:
            yield step, run.recipe.every_n_steps * step.lr * queries

    def own_scores(self, run: Store) -> Iterator[tuple[Step, Float[Tensor, " n"]]]:
        """Yield the visits' squared gradient norms, as far as the step went (eq. 1 with q = i)."""
        for step in run:
            own = squared_norms(step.sketch) / step.weights
            yield step, run.recipe.every_n_steps * step.lr * own
