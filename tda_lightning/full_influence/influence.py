r"""Influence function with whole gradients, at the weights that the model has or along a run.

.. math:: s(q, i) = \frac{1}{n} \, g_q^\top (H + \delta I)^{-1} g_i

Koh & Liang (2017), "Understanding Black-box Predictions via Influence Functions", eq. 2; here with
the sign of a presence. :math:`H` is the curvature of the mean loss over the training data. Weight
decay that the optimizer applies is no part of the loss, and belongs to the damping.

**Along a run** that kept snapshots, :math:`H` and :math:`g_i` are means over them, each in the
coordinates of the optimizer, for the reasons that
:class:`~tda_lightning.InfluenceFunction` has; its sketches are what is spared.

**Damping**, where none is given, is what such a run suggests, 1.5 / (sum of learning rates), if its
steps are gradient steps in its coordinates; else the solver's own. ``EKFAC`` takes a tenth of the
mean eigenvalue, as Grosse et al. (2023), "Studying Large Language Model Generalization with
Influence Functions". Exact solvers want more, since most eigenvalues of a model are tiny: they take
a fiftieth of the largest one, so that the condition number is 51, which came close to the best on
every task measured. What a Hessian's eigenvalues reach below zero comes on top.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from tda_lightning.arguments import require_kind, require_positive, require_whole
from tda_lightning.full_influence.checks import require_finite
from tda_lightning.full_influence.curvature import GaussNewton, ModelCurvature
from tda_lightning.full_influence.objective import Objective
from tda_lightning.full_influence.solvers import Solver
from tda_lightning.full_influence.woodbury import Woodbury

if TYPE_CHECKING:
    from tda_lightning.full_influence.curvlinops_bindings import Operator


@dataclass(frozen=True)
class Solution:
    """What queries look for in gradients.

    Attributes:
        directions: Damped inverse curvature times the queries' gradients, shape ``(n_query, d)``.
        damping: That was added.
    """

    directions: Float[Tensor, "n_query d"]
    damping: float


@dataclass(frozen=True)
class FullInfluenceFunction:
    """Inverse curvature times gradient, for all parameters; scores estimate a change of the loss.

    Memory: one vector of the parameters' size per query, and some more for those solved at once.

    Attributes:
        solver: How to solve with the curvature.
        curvature: What kind of it.
        damping: Added to its diagonal; ``None`` for what the run suggests, if there is one, or what
            the solver takes; and as much more as the curvature has eigenvalues below zero.
        layers: Names of the layers whose parameters count, with ``*`` for any characters; all by
            default. The last one alone is often told from the others, and cheap.
        query_batch_size: How many queries to solve for together.
    """

    solver: Solver = Woodbury()
    curvature: ModelCurvature = GaussNewton()
    damping: float | None = None
    layers: Sequence[str] | None = None
    query_batch_size: int = 32

    def __post_init__(self) -> None:
        """Raise unless these are what they are said to be."""
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
        """Solve for every query's gradient.

        Args:
            objective: What was trained, and on what.
            queries: Gradients of the queries' losses, shape ``(n_query, d)``.
            progress: Show a progress bar.

        Raises:
            ValueError: If the training step cannot be differentiated twice, the curvature is not
                positive, or the solver does not arrive.
        """
        require_finite(
            queries,
            "The gradients of the queries",
            "Look for NaN or infinity in their inputs and targets, and in the weights.",
        )
        with torch.enable_grad(), warnings.catch_warnings():
            # torch's own forward mode is compiled with what torch has come to warn about.
            warnings.filterwarnings("ignore", message=r"`torch.jit.script` is deprecated")
            operator = self.solver.operator(objective, self.curvature)
            damping = self._damping(objective, operator)
            inverse = self.solver.inverse(operator, damping)
            parts = torch.split(queries, self.query_batch_size)
            bar = tqdm(parts, desc="solving", unit="part", leave=False, disable=not progress)
            return Solution(torch.cat([inverse(part) for part in bar]), damping)

    def _damping(self, objective: Objective, operator: Operator) -> float:
        if self.damping is not None:
            return self.damping
        found = objective.damping
        if found is None:
            found = self.solver.default_damping(operator)
        found += self.curvature.below_zero(operator)
        if not 0 < found < math.inf:
            raise ValueError(
                f"The default damping is {found:.3g}; expected a finite number above 0. It follows "
                f"from the curvature of `{objective.argument}`: pass a number as `damping=`."
            )
        return found


def _require_names(layers: Any) -> None:
    """Raise unless layers are named, in a list: a string would be taken for a list of letters."""
    is_list = isinstance(layers, Sequence) and not isinstance(layers, str)
    if not is_list or not layers or not all(isinstance(one, str) for one in layers):
        raise ValueError(
            f'`layers` is {layers!r}; expected a list of names, such as `["head"]`. Leave it out '
            "for all layers."
        )
