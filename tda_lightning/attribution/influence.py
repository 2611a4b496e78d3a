r"""Influence function: how would the optimal weights change without a sample, to first order?

.. math:: s(q, i) = \frac{1}{n} \, g_q^\top (\bar H + \delta I)^{-1} \bar g_i

Koh & Liang (2017), "Understanding Black-box Predictions via Influence Functions", eq. 2, with three
differences. The sign is that of the sample's presence. The matrix is :math:`k \times k`, in sketch
space. Curvature and gradients are averaged over the training instead of taken at its end: the
training is not at a minimum, and the averages agree better with the mean effect of retraining.

**Damping** accounts for the finite length of the training. Let :math:`\tau = \sum_t \eta_t` be the
sum of its learning rates. Gradient descent removes :math:`1 - e^{-\tau \lambda}` of a displacement
along an eigenvector. For a :math:`\delta` of the order of :math:`1 / \tau`, this is close to
:math:`\lambda / (\lambda + \delta)`. The default, :math:`1.5 / \tau`, was the best or near the best
on every measured task. Weight decay is also curvature, and is added.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from tda_lightning.attribution.attributor import SelfAttributor, mean_over_visits
from tda_lightning.attribution.dynamics.curvature import (
    Curvature,
    SampledOrWeighted,
    objective_curvature,
)
from tda_lightning.attribution.dynamics.optimizer import (
    Extent,
    has_plain_rates,
    require_training,
    warn_of_approximations,
)
from tda_lightning.attribution.linalg import damped_root, is_lost_in_rounding
from tda_lightning.attribution.steps import DeviceView, last_epoch, last_visits, unweighted
from tda_lightning.stores import Store
from tda_lightning.stores.arguments import (
    require_choice,
    require_kind,
    require_limit,
    require_not_negative,
)
from tda_lightning.stores.precision import in_double_precision
from tda_lightning.stores.snapshots import Moment, has_later_snapshots
from tda_lightning.stores.step import Step

DAMPING_FACTOR = 1.5
Steps = Literal["run", "last epoch"]
Visits = Literal["all visits", "last visit"]


@dataclass(frozen=True)
class InfluenceFunction(SelfAttributor):
    r"""Inverse curvature times gradient, in sketch space.

    A score estimates by how much the sample's presence lowered the query's loss. Memory: three
    matrices of :math:`k \times k` numbers, which have double precision if curvatures are so
    large that the damping would be lost in rounding.

    Attributes:
        curvature: How to build the curvature of each step.
        damping: Added to the diagonal of the curvature, besides the weight decay of the run. With
            ``None``, it is 1.5 / (sum of the learning rates used, over 1 - momentum).
        curvature_over: The steps over which curvature is averaged.
        rows: The visits over which a sample's gradient is averaged.
        curvature_from: Another recording, such as one at the final weights, from which to take the
            curvature.
        rows_from: Another recording from which to take the training rows.
        max_gb: Maximum memory of the matrices, in GB.
    """

    curvature: Curvature = SampledOrWeighted()
    damping: float | None = None
    curvature_over: Steps = "run"
    rows: Visits = "all visits"
    curvature_from: Store | None = None
    rows_from: Store | None = None
    max_gb: float = 8.0
    _factor: Tensor | None = field(default=None, init=False, repr=False, compare=False)
    combine = mean_over_visits

    def __post_init__(self) -> None:
        require_kind("curvature", self.curvature, Curvature, "`SampledLabels()`")
        require_choice("curvature_over", self.curvature_over, Steps)
        require_choice("rows", self.rows, Visits)
        require_limit("max_gb", self.max_gb)
        if self.damping is not None:
            require_not_negative("damping", self.damping)
        for name in ("curvature_from", "rows_from"):
            if getattr(self, name) is not None:
                require_kind(name, getattr(self, name), Store, "`record(...)` returns")

    def require(self, run: Store) -> None:
        """Check the size of the rows, that the run gives a damping, and that others match it."""
        super().require(run)
        k = run.recipe.dimension
        gigabytes = 3 * k**2 * run.recipe.torch_dtype.itemsize / 1e9
        if gigabytes > self.max_gb:
            raise ValueError(
                f"`InfluenceFunction` needs three matrices of {k:,} x {k:,} numbers, "
                f"{gigabytes:.1f} GB; expected at most {self.max_gb:g}. Pass `method=Unrolled()`, "
                "which needs none, record with a sketch, such as `KroneckerCountSketch(2048)`, or "
                "increase `max_gb=`."
            )
        if self.damping is None:
            require_training(run)
        others = {"curvature_from": self.curvature_from, "rows_from": self.rows_from}
        for name, other in others.items():
            if other is None:
                continue
            run.recipe.require_alike(other.recipe, name)
            if len(other) == 0:
                raise ValueError(
                    f"`{name}` holds no steps; expected at least one. Record some batches."
                )

    def moments(self, run: Store) -> tuple[Moment, ...]:
        """Return the later snapshots, if there are any: averages are better at what is typical."""
        return ("snapshots",) if has_later_snapshots(run) else ("now",)

    def directions(
        self, run: Store, queries: Float[Tensor, "n_query k"]
    ) -> Iterator[tuple[Step, Float[Tensor, "n_query k"]]]:
        """Yield each step with the same direction: inverse curvature times the query's gradient."""
        extent = Extent.of(run)
        root = self._root(run, extent, queries)
        solution = torch.cholesky_solve(queries.to(root).mT, root).mT.to(queries)
        direction = extent.weight / run.n_train * solution
        for step in self._visits(run, queries):
            yield step, direction

    def precomputed(self, run: Store, like: Tensor) -> InfluenceFunction:
        """Return a method that stores the factorized curvature."""
        return self._with(_factor=self._root(run, Extent.of(run), like))

    def own_scores(self, run: Store) -> Iterator[tuple[Step, Float[Tensor, " n"]]]:
        """Yield each step with the effect of each visit's sample on that visit's loss."""
        extent, like = Extent.of(run), torch.empty(0, dtype=run.recipe.torch_dtype)
        root = self._root(run, extent, like)
        for step in self._visits(run, like):
            # With root L and row g: g^T (L L^T)^{-1} g is the squared norm of L^{-1} g.
            g = step.sketch.to(root).mT
            whitened = torch.linalg.solve_triangular(root, g, upper=False)  # (k, n)
            scores = whitened.square().sum(dim=0).to(step.sketch)
            yield step, extent.weight / run.n_train * scores

    def _root(self, run: Store, extent: Extent, like: Tensor) -> Float[Tensor, "k k"]:
        """Return the Cholesky factor of the damped curvature, in a sufficient precision."""
        if self._factor is not None:
            return self._factor.to(like.device)
        if self.damping is None:
            warn_of_approximations(run)
            damping = suggested_damping(extent)
        else:
            damping = self.damping + extent.decay
        recording = run if self.curvature_from is None else DeviceView(self.curvature_from, like)
        steps = recording if self.curvature_over == "run" else last_epoch(recording)
        hessian = objective_curvature(steps, self.curvature)
        if is_lost_in_rounding(damping, hessian):
            hessian = objective_curvature(
                DeviceView(steps, in_double_precision(like)), self.curvature
            )
        return damped_root(hessian, damping)

    def _visits(self, run: Store, like: Tensor) -> Iterator[Step]:
        recording = run if self.rows_from is None else DeviceView(self.rows_from, like)
        steps = iter(recording) if self.rows == "all visits" else last_visits(recording)
        return map(unweighted, steps)


def suggested_damping(extent: Extent) -> float:
    """Return 1.5 / (sum of learning rates) + weight decay, in the coordinates of the run's rows.

    Raises:
        ValueError: If the learning rates of the run sum to 0.
    """
    if extent.total_lr == 0:
        raise ValueError(
            "The learning rates of these steps sum to 0, and the default damping is derived from "
            "that sum; expected steps that moved the weights. Use more steps, or pass `damping=`."
        )
    return DAMPING_FACTOR / extent.total_lr + extent.decay


def damping_of(run: Store) -> float:
    """Return the damping that a run suggests: 1.5 / (sum of learning rates), plus weight decay.

    :class:`InfluenceFunction` uses it by default. Pass it to methods that do not read the run, such
    as ``FullInfluenceFunction`` at the model's current weights.

    Raises:
        ValueError: If the steps are not plain gradient steps such as those of SGD, or if they did
            not move the weights.
    """
    if run.preconditioner() is not None or not has_plain_rates(run):
        optimizer = run.facts[-1].optimizer
        raise ValueError(
            f"The damping of this run only holds in the coordinates of its `{optimizer}`; expected "
            "a run in the coordinates of the parameters, such as one of SGD. Pass a number as "
            "`damping`."
        )
    require_training(run)
    extent = Extent.of(run)
    return suggested_damping(extent) / extent.weight
