r"""TracIn: how much did the visits of a training sample push the query's loss down?

.. math:: s(q, i) = \sum_{t \,:\, i \in B_t} \eta_t \, \langle g_q, g_i^{(t)} \rangle

Pruthi et al. (2020), "Estimating Training Data Influence by Tracing Gradient Descent", eq. 1. Rows
are as-applied contributions, so :math:`g_i^{(t)}` holds the sample's weight in its batch. The
query's gradient is the one at the weights given, for every step. The inner product may be taken
over the parameters of some layers only, the last one, say.

With a run's snapshots, each step's query gradient is taken at the nearest one, :math:`c(t)`
(TracInCP, sec. 3):

.. math:: s(q, i) = \sum_{t \,:\, i \in B_t}
   \eta_t \, \langle \nabla \ell_q(\theta_{c(t)}), \, g_i^{(t)} \rangle
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from tda_lightning.attribution.attributor import Attributor, SelfAttributor
from tda_lightning.attribution.dynamics.optimizer import require_training
from tda_lightning.attribution.linalg import squared_norms
from tda_lightning.stores import Store
from tda_lightning.stores.snapshots import nearest_parts
from tda_lightning.stores.step import Step


@dataclass(frozen=True)
class TracIn(SelfAttributor):
    """Sum over steps of learning rate times inner product with the query's gradient.

    With a stride, each recorded step stands for the ones in between.

    Attributes:
        layers: Names of the layers whose gradients count, with ``*`` for any characters; all by
            default. They can be told apart in runs whose projector keeps layers apart, as
            ``Identity`` and ``Kronecker`` do; of others, record some layers only.
    """

    layers: Sequence[str] | None = None

    def directions(
        self, run: Store, queries: Float[Tensor, "n_query k"]
    ) -> Iterator[tuple[Step, Float[Tensor, "n_query k"]]]:
        """Look for the query's gradient, as far as the step went."""
        chosen = self._chosen(run, queries)
        for step in run:
            yield step, run.recipe.every_n_steps * step.lr * chosen

    def visit_scores(
        self, run: Store, queries: Float[Tensor, "n_query k"]
    ) -> Iterator[tuple[Step, Float[Tensor, "n n_query"]]]:
        """Scale products instead of directions: they are far smaller."""
        columns = self._chosen(run, queries).mT.contiguous()  # products are faster with these
        for step in run:
            yield step, (step.sketch @ columns).mul_(run.recipe.every_n_steps * step.lr)

    def own_scores(self, run: Store) -> Iterator[tuple[Step, Float[Tensor, " n"]]]:
        """Yield the visits' squared gradient norms, as far as the step went (eq. 1 with q = i)."""
        for step in run:
            own = squared_norms(self._chosen(run, step.sketch)) / step.weights
            yield step, run.recipe.every_n_steps * step.lr * own

    def require(self, run: Store) -> None:
        """Raise unless the run moved weights and the layers can be told apart."""
        super().require(run)
        require_training(run)
        if self.layers is not None:
            run.recipe.columns_of(self.layers)

    def _chosen(self, run: Store, rows: Float[Tensor, "n k"]) -> Float[Tensor, "n k"]:
        """Return the rows with zeros in the columns of other layers."""
        if self.layers is None:
            return rows
        columns = run.recipe.columns_of(self.layers).to(rows.device)
        return torch.zeros_like(rows).index_copy_(1, columns, rows[:, columns])


@dataclass(frozen=True)
class TracInCP(Attributor):
    """TracIn with each step's query gradients taken at the nearest snapshot.

    Attributes:
        method: The TracIn whose layers count.
    """

    method: TracIn

    def require(self, run: Store) -> None:
        """Raise unless the method can be asked of the run."""
        self.method.require(run)

    def directions(
        self, run: Store, queries: Float[Tensor, "n_query width"]
    ) -> Iterator[tuple[Step, Float[Tensor, "n_query k"]]]:
        """Look for what the method does, in each part of the run with the rows that are its own."""
        parts = list(nearest_parts(run))
        for (_, part), rows in zip(parts, queries.chunk(len(parts), dim=1), strict=True):
            yield from self.method.directions(run[part], rows)

    def __repr__(self) -> str:
        """Show the method."""
        return repr(self.method)
