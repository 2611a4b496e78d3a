r"""Influence function: what would the best weights be without this sample, to first order?

.. math:: s(q, i) = \frac{1}{n} \, g_q^\top (\bar H + \delta I)^{-1} \bar g_i

Koh & Liang (2017), "Understanding Black-box Predictions via Influence Functions", eq. 2; here with
the sign of a presence, in sketch space, where the matrix is :math:`k \times k`, and with curvature
and gradients averaged over the training instead of taken at its end: the training is not at a
minimum, and the averages agree better with what retraining does on average.

**Damping** stands for what a training of finite length leaves unlearned. Descent for a total time
of :math:`\tau = \sum_t \eta_t` undoes :math:`1 - e^{-\tau \lambda}` of a displacement along an
eigenvector, which :math:`\lambda / (\lambda + \delta)` resembles for a :math:`\delta` of the order
of :math:`1 / \tau`. The default, :math:`1.5 / \tau`, was the best or near it on every task
measured.
Weight decay is curvature too, and added.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from tda_lightning.arguments import require_choice, require_kind, require_not_negative
from tda_lightning.attribution.attributor import SelfAttributor
from tda_lightning.attribution.device_view import DeviceView
from tda_lightning.attribution.dynamics.curvature import (
    Curvature,
    SampledOrEmpirical,
    objective_curvature,
)
from tda_lightning.attribution.dynamics.optimizer import (
    Extent,
    has_plain_rates,
    require_training,
    warn_of_approximations,
)
from tda_lightning.attribution.linalg import damped_root
from tda_lightning.attribution.visits import as_own_gradients, last_epoch, last_visits
from tda_lightning.stores import Store
from tda_lightning.stores.step import Step

DAMPING_FACTOR = 1.5
Steps = Literal["run", "last epoch"]
Visits = Literal["all visits", "last visit"]


@dataclass(frozen=True)
class InfluenceFunction(SelfAttributor):
    r"""Inverse curvature times gradient; scores estimate a change of the query's loss.

    Memory: three matrices of :math:`k \times k` numbers.

    Attributes:
        curvature: How to build each step's curvature.
        damping: Added to the curvature's diagonal, besides the run's weight decay; ``None`` for
            1.5 / (sum of the learning rates used, over 1 - momentum).
        curvature_over: Which steps to average curvature over.
        rows: Which visits to average a sample's gradient over.
        curvature_from: A recording to take curvature from instead, such as one at the final
            weights.
        rows_from: A recording to take training rows from instead.
    """

    curvature: Curvature = SampledOrEmpirical()
    damping: float | None = None
    curvature_over: Steps = "run"
    rows: Visits = "all visits"
    curvature_from: Store | None = None
    rows_from: Store | None = None
    _factor: Tensor | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Raise unless every argument is one of those there are."""
        require_kind("curvature", self.curvature, Curvature, "`SampledLabels()`")
        require_choice("curvature_over", self.curvature_over, Steps)
        require_choice("rows", self.rows, Visits)
        if self.damping is not None:
            require_not_negative("damping", self.damping)
        for name in ("curvature_from", "rows_from"):
            if getattr(self, name) is not None:
                require_kind(name, getattr(self, name), Store, "`record(...)` returns")

    def require(self, run: Store) -> None:
        """Raise unless the run tells its damping, and other recordings can stand for its rows."""
        super().require(run)
        if self.damping is None:
            require_training(run)
        others = {"curvature_from": self.curvature_from, "rows_from": self.rows_from}
        for name, other in others.items():
            if other is None:
                continue
            run.recipe.require_alike(other.recipe, name)
            if len(other) == 0:
                raise ValueError(f"`{name}` holds no step; expected one. Record some batches.")

    def directions(
        self, run: Store, queries: Float[Tensor, "n_query k"]
    ) -> Iterator[tuple[Step, Float[Tensor, "n_query k"]]]:
        """Look for one direction in all visits: the query's gradient, as the minimum sees it."""
        extent = Extent.of(run)
        solved = torch.cholesky_solve(queries.mT, self._root(run, extent, queries)).mT
        direction = extent.weight / len(run.train_ids()) * solved
        for step in self._visits(run, queries):
            yield step, direction

    def precomputed(self, run: Store, like: Tensor) -> InfluenceFunction:
        """Return a method that has factorized the curvature, and keeps its factor."""
        return replace(self, _factor=self._root(run, Extent.of(run), like))

    def own_scores(self, run: Store) -> Iterator[tuple[Step, Float[Tensor, " n"]]]:
        """Yield what the presence of each visit's sample does to that visit's loss."""
        extent, like = Extent.of(run), torch.empty(0, dtype=run.recipe.torch_dtype)
        root = self._root(run, extent, like)
        for step in self._visits(run, like):
            halfway = torch.linalg.solve_triangular(root, step.sketch.mT, upper=False)  # (k, n)
            own = halfway.square().sum(dim=0)
            yield step, extent.weight / len(run.train_ids()) * own

    def combine(
        self, total: Float[Tensor, "n_train n_query"], visits: Float[Tensor, "n_train 1"]
    ) -> Float[Tensor, "n_train n_query"]:
        """Average over visits; samples that were never drawn keep zero."""
        return total.div_(visits.clamp_min(1))

    def _root(self, run: Store, extent: Extent, like: Tensor) -> Float[Tensor, "k k"]:
        """Return the Cholesky factor of the damped curvature."""
        if self._factor is not None:
            return self._factor
        source = run if self.curvature_from is None else DeviceView(self.curvature_from, like)
        steps = source if self.curvature_over == "run" else last_epoch(source)
        matrix = objective_curvature(steps, self.curvature)
        if self.damping is None:
            warn_of_approximations(run)
            return damped_root(matrix, suggested_damping(extent))
        return damped_root(matrix, self.damping + extent.decay)

    def _visits(self, run: Store, like: Tensor) -> Iterator[Step]:
        source = run if self.rows_from is None else DeviceView(self.rows_from, like)
        steps = iter(source) if self.rows == "all visits" else last_visits(source)
        return map(as_own_gradients, steps)


def suggested_damping(extent: Extent) -> float:
    """Return 1.5 / (sum of rates) and the weight decay, in the coordinates of the run's rows.

    Raises:
        ValueError: If the run moved nothing.
    """
    if extent.time == 0:
        raise ValueError(
            "The learning rates of these steps sum to 0, and a damping follows from that sum; "
            "expected steps that moved the weights. Take more of them, or pass `damping=`."
        )
    return DAMPING_FACTOR / extent.time + extent.decay


def damping_of(run: Store) -> float:
    """Return the damping that a recorded run suggests: 1.5 / (sum of rates), and its weight decay.

    It is what the default adds, for methods that know nothing of the run: for
    ``FullInfluenceFunction`` at the weights that the model has.

    Raises:
        ValueError: If the steps were no plain gradient steps, as those of SGD are.
    """
    if run.preconditioner() is not None or not has_plain_rates(run):
        optimizer = run.facts[-1].optimizer
        raise ValueError(
            f"The damping of this run is that of the coordinates of its `{optimizer}`; "
            "expected a run in those of the parameters, of SGD say. Pass a number as damping."
        )
    require_training(run)
    extent = Extent.of(run)
    return suggested_damping(extent) / extent.weight
