r"""TracIn: how much did the visits of a training sample push the query's loss down?

.. math:: s(q, i) = \sum_{t \,:\, i \in B_t} \eta_t \, \langle g_q, g_i^{(t)} \rangle

Pruthi et al. (2020), "Estimating Training Data Influence by Tracing Gradient Descent", eq. 1. Rows
are as-applied contributions, so :math:`g_i^{(t)}` includes the sample's weight in its batch. For
every step, the query's gradient is the one at the given weights. The inner product may be limited
to the parameters of some layers, such as the last one.

With a run's snapshots, each step's query gradient is taken at the nearest one, :math:`c(t)`
(TracInCP, sec. 3):

.. math:: s(q, i) = \sum_{t \,:\, i \in B_t}
   \eta_t \, \langle \nabla \ell_q(\theta_{c(t)}), \, g_i^{(t)} \rangle
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from tda_lightning.attribution.attributor import Attributor, SelfAttributor
from tda_lightning.attribution.dynamics.optimizer import require_training
from tda_lightning.stores import Store
from tda_lightning.stores.snapshots import Moment, nearest_parts
from tda_lightning.stores.step import Step


@dataclass(frozen=True)
class TracIn(SelfAttributor):
    """Learning rate times inner product with the query's gradient, summed over the steps.

    In a run that was recorded with a stride, each recorded step also represents the skipped ones.

    Attributes:
        layers: Names of the layers whose gradients count, with ``*`` for any characters, or with
            ``!`` in front for those that do not; all layers by default. Scores are exact for
            projectors that give each layer separate columns, such as ``Identity`` or ``Kronecker``.
            With others, queries have the gradients of these layers only, and the remaining part of
            a row adds noise of mean zero. Self-influence is then refused.
    """

    layers: Sequence[str] | None = None
    _has_chosen_queries: bool = field(default=False, init=False, repr=False, compare=False)

    @property
    def query_layers(self) -> Sequence[str] | None:
        """Names of the layers whose gradients count."""
        return self.layers

    def for_queries_at(self, at: Moment | None) -> Attributor:
        """Return the method for queries with the gradients of ``layers`` only."""
        chosen = self._with(_has_chosen_queries=self.layers is not None)
        return TracInCP(chosen) if at == "snapshots" else chosen

    def directions(
        self, run: Store, queries: Float[Tensor, "n_query k"]
    ) -> Iterator[tuple[Step, Float[Tensor, "n_query k"]]]:
        """Yield each step with the query's gradient, scaled by the learning rate."""
        g_q = self._select_layers(run, queries)
        for step in run:
            yield step, _eta(run, step) * g_q

    def visit_scores(
        self, run: Store, queries: Float[Tensor, "n_query k"]
    ) -> Iterator[tuple[Step, Float[Tensor, "n n_query"]]]:
        """Yield each step with its visits' scores; scaling these is cheaper than directions."""
        g_q = self._select_layers(run, queries).mT.contiguous()  # columns: a faster product
        for step in run:
            yield step, (step.sketch @ g_q).mul_(_eta(run, step))

    def own_scores(self, run: Store) -> Iterator[tuple[Step, Float[Tensor, " n"]]]:
        """Yield the visits' squared gradient norms times the learning rate (eq. 1 with q = i)."""
        for step in run:
            # Weights are zero in a step whose gradient was zeroed, and so are its rows.
            weights = step.weights.clamp_min(1e-30)
            inner = self._select_layers(run, step.sketch).square().sum(dim=1) / weights
            yield step, _eta(run, step) * inner

    def require(self, run: Store) -> None:
        """Check that the run is a training, and that its rows keep the layers separate."""
        super().require(run)
        require_training(run)
        if self._has_chosen_queries and run.recipe.widths is None:
            warnings.warn(
                "`TracIn(layers=...)` estimates its scores: the projector of the run adds all "
                "layers into the same columns, so that the others add noise. For exact scores, "
                "record with `Kronecker()`, `Identity()` or `GradientRecorder(layers=[...])`.",
                stacklevel=4,
            )
        elif self.layers is not None:
            run.recipe.columns_of(self.layers)

    def _select_layers(self, run: Store, rows: Float[Tensor, "n k"]) -> Float[Tensor, "n k"]:
        """Return the rows with zeros in the columns of other layers."""
        if self.layers is None or (self._has_chosen_queries and run.recipe.widths is None):
            return rows
        columns = run.recipe.columns_of(self.layers).to(rows.device)
        return torch.zeros_like(rows).index_copy_(1, columns, rows[:, columns])


def _eta(run: Store, step: Step) -> float:
    return run.recipe.every_n_steps * step.lr


@dataclass(frozen=True)
class TracInCP(Attributor):
    """TracIn with each step's query gradients taken at the nearest snapshot."""

    method: TracIn

    @property
    def query_layers(self) -> Sequence[str] | None:
        """Names of the layers whose gradients count."""
        return self.method.layers

    def moments(self, run: Store) -> tuple[int, ...]:
        """Return the snapshots that are nearest to some steps."""
        return tuple(snapshot for snapshot, _ in nearest_parts(run))

    def require(self, run: Store) -> None:
        """Check that TracIn can be applied to the run."""
        self.method.require(run)

    def directions(
        self, run: Store, queries: Float[Tensor, "n_query width"]
    ) -> Iterator[tuple[Step, Float[Tensor, "n_query k"]]]:
        """Yield TracIn's directions for each part of the run, from the rows at its snapshot."""
        parts = list(nearest_parts(run))
        for (_, part), rows in zip(parts, queries.chunk(len(parts), dim=1), strict=True):
            yield from self.method.directions(run[part], rows)

    def __repr__(self) -> str:
        return repr(self.method)
