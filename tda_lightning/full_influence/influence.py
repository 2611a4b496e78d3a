r"""Influence function with full gradients, at the model's current weights or along a run.

.. math:: s(q, i) = \frac{1}{n} \, g_q^\top (H + \delta I)^{-1} g_i

Koh & Liang (2017), "Understanding Black-box Predictions via Influence Functions", eq. 2, with the
sign that stands for the presence of a sample. :math:`H` is the curvature of the mean loss over the
training data. Weight decay of the optimizer is not part of that loss; it belongs to the damping.

**Along a run** that kept snapshots, :math:`H` and :math:`g_i` are means over the snapshots, each in
the optimizer's coordinates. :class:`~tda_lightning.InfluenceFunction` gives the reasons; it also
sketches.

**Damping** defaults to the value that such a run suggests, 1.5 / (sum of learning rates), if its
steps are gradient steps in its coordinates. Otherwise the solver chooses it. ``EKFAC`` takes a
tenth of the mean eigenvalue, as Grosse et al. (2023), "Studying Large Language Model Generalization
with Influence Functions". Exact solvers need more, since most eigenvalues of a model are tiny. They
take a fiftieth of the largest one, so that the condition number is 51, which was close to the best
on every task measured. For a Hessian, the magnitude of its lowest negative eigenvalue is added.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tda_lightning.full_influence.curvature import GaussNewton, ModelCurvature
from tda_lightning.full_influence.objective import Objective
from tda_lightning.full_influence.operators import Operator, require_finite
from tda_lightning.full_influence.solvers import Solver
from tda_lightning.full_influence.woodbury import Woodbury
from tda_lightning.results.progress import progress_bar
from tda_lightning.stores.arguments import require_kind, require_positive, require_whole


@dataclass(frozen=True)
class Solution:
    """One solved direction per query; its product with a training gradient is a score."""

    directions: Float[Tensor, "n_query d"]
    damping: float


@dataclass(frozen=True)
class FullInfluenceFunction:
    """Inverse curvature times gradient, for all parameters; scores estimate a change of the loss.

    Memory: one vector of the parameters' size per query, and a few more per query that is solved
    for at the same time.

    Attributes:
        solver: The solver of the damped linear system.
        curvature: The kind of curvature.
        damping: Added to the curvature's diagonal. ``None`` takes the value that the run suggests,
            or else the solver's default, and adds the magnitude of the lowest negative eigenvalue.
        layers: Names of the layers whose parameters count, with ``*`` for any characters; all by
            default. The last layer alone is a common choice, and cheap.
        query_batch_size: Number of queries to solve for together.
    """

    solver: Solver = Woodbury()
    curvature: ModelCurvature = GaussNewton()
    damping: float | None = None
    layers: Sequence[str] | None = None
    query_batch_size: int = 32

    def __post_init__(self) -> None:
        require_kind("solver", self.solver, Solver, "`Woodbury()`")
        require_kind("curvature", self.curvature, ModelCurvature, "`GaussNewton()`")
        if self.damping is not None:
            require_positive("damping", self.damping)
        if self.layers is not None:
            _require_names(self.layers)
        require_whole("query_batch_size", self.query_batch_size, least=1)

    def solve(
        self, objective: Objective, queries: Float[Tensor, "n_query d"], *, progress: bool = True
    ) -> Solution:
        """Multiply the gradient of every query by the damped inverse curvature.

        Raises:
            ValueError: If the training step cannot be differentiated twice, the curvature is not
                positive, or the solver does not converge.
        """
        require_finite(
            queries,
            "The gradients of the queries",
            "Look for NaN or infinity in their inputs and targets, and in the weights.",
        )
        with torch.enable_grad():
            operator = self.solver.operator(objective, self.curvature)
            damping = self._damping(objective, operator)
            inverse = self.solver.inverse(operator, damping)
            parts = torch.split(queries, self.query_batch_size)
            bar = progress_bar(parts, "solving", "part", shown=progress)
            return Solution(torch.cat([inverse(part) for part in bar]), damping)

    def _damping(self, objective: Objective, operator: Operator) -> float:
        if self.damping is not None:
            return self.damping
        damping = objective.damping
        if damping is None:
            damping = self.solver.default_damping(operator)
        damping += self.curvature.below_zero(operator)
        if not 0 < damping < math.inf:
            raise ValueError(
                f"The default damping is {damping:.3g}; expected a finite number above 0. It "
                f"follows from the curvature of `{objective.argument}`: pass a number as "
                "`damping=`."
            )
        return damping


def _require_names(layers: Any) -> None:
    """Check that layers are a list of names; a string would count as a list of letters."""
    is_list = isinstance(layers, Sequence) and not isinstance(layers, str)
    if not is_list or not layers or not all(isinstance(name, str) for name in layers):
        raise ValueError(
            f'`layers` is {layers!r}; expected a list of names, such as `["head"]`. Omit it for '
            "all layers."
        )
