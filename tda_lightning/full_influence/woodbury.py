r"""Woodbury: a curvature that is made of few rows is inverted at once.

The gradients of labels that the model draws itself, as rows :math:`C` scaled such that
:math:`C^\top C` is the Gauss-Newton matrix on average (Kunstner et al., 2019, "Limitations of the
Empirical Fisher Approximation for Natural Gradient Descent", section 3), are inverted by Woodbury's
identity,

.. math:: (C^\top C + \delta I)^{-1} = \frac{1}{\delta}
   \left( I - C^\top (C C^\top + \delta I)^{-1} C \right)

so that what is factorized has as many rows as there are draws, or parameters, whichever are fewer.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from tda_lightning.arguments import require_limit, require_whole
from tda_lightning.attribution.linalg import damped_root
from tda_lightning.full_influence.checks import require_finite
from tda_lightning.full_influence.curvature import GaussNewton, ModelCurvature
from tda_lightning.full_influence.objective import Objective
from tda_lightning.full_influence.solvers import SHARE_OF_LARGEST, Inverse, Solver

if TYPE_CHECKING:
    from tda_lightning.full_influence.curvlinops_bindings import Operator

# Below this, iterating takes longer than all eigenvalues.
_SMALL = 64
_AT_ONCE = 1024
# Below this, in units of the number format's precision, scores are off by some percent.
_TOLD_APART = 8


@dataclass(frozen=True)
class Woodbury(Solver):
    """The Gauss-Newton matrix of sampled labels, inverted exactly. The default.

    It needs nothing but a few passes over the data, and neither curvlinops nor SciPy.

    Attributes:
        draws: How many labels to draw for every prediction, in all; along a run, at least one at
            each snapshot.
        max_gb: Most memory, in GB, for rows of the parameters' size and what it takes to solve with
            them: one for each sample and draw, or one for each parameter, whichever are fewer.
    """

    draws: int = 4
    max_gb: float = 8.0

    def __post_init__(self) -> None:
        """Raise unless there is something to draw, and room for it."""
        require_whole("draws", self.draws, least=1)
        require_limit("max_gb", self.max_gb)

    def require(self) -> None:
        """Ask for nothing."""

    def operator(self, objective: Objective, curvature: ModelCurvature) -> Operator:
        """Return the matrix of the sampled labels."""
        if curvature != GaussNewton() or objective.sampled is None:
            raise ValueError(
                "`Woodbury` draws the labels of the Gauss-Newton matrix itself; expected "
                f"`curvature=GaussNewton()`, got `{curvature}`. Leave it out, or take "
                "`ConjugateGradient()`."
            )
        views = len(objective.linearization_points)
        draws = math.ceil(self.draws / views)
        m, d = draws * views * objective.n, objective.d
        self._require_room(m, objective)
        # Closed whatever happens: until then the model has other weights.
        with closing(objective.sampled(draws)) as drawn:
            rows = _finite(drawn, objective.argument)
            return LowRankCurvature(_stacked(rows, m)) if m < d else DenseCurvature(rows, d)

    def default_damping(self, operator: Operator) -> float:
        """Return a share of the largest eigenvalue."""
        assert isinstance(operator, LowRankCurvature | DenseCurvature)
        return SHARE_OF_LARGEST * operator.largest()

    def inverse(self, operator: Operator, damping: float) -> Inverse:
        """Return the inverse, damped."""
        assert isinstance(operator, LowRankCurvature | DenseCurvature)
        return operator.inverse(damping)

    def _require_room(self, m: int, objective: Objective) -> None:
        # Rows are in single precision at least.
        d, size = objective.d, max(4, objective.parameters[0].element_size())
        side = min(m, d)
        # What is factorized, and its root, are in double precision.
        gigabytes = (2 * 8 * side**2 + (size * m * d if m < d else 0)) / 1e9
        if gigabytes > self.max_gb:
            raise ValueError(
                f"`Woodbury` would keep {side:,} rows of {d:,} numbers, and what it takes to solve "
                f"with them: {gigabytes:.1f} GB; expected at most {self.max_gb:g}. Allow more with "
                "`max_gb=`, take the curvature of fewer samples with `curvature_loader=`, choose "
                "layers with `layers=[...]`, or take `ConjugateGradient()`, which keeps nothing."
            )


class LowRankCurvature:
    """A curvature whose rows are kept, since there are fewer of them than parameters.

    Args:
        rows: Their outer products sum to it.
    """

    def __init__(self, rows: Float[Tensor, "m d"]) -> None:
        self._rows = rows
        # In double precision from here on: with little damping two large terms nearly cancel.
        self._gram = (rows @ rows.mT).double()
        self.shape = (rows.shape[1], rows.shape[1])
        self.device, self.dtype = rows.device, rows.dtype

    def __matmul__(self, vectors: Float[Tensor, "d n"]) -> Float[Tensor, "d n"]:
        """Return the product with the columns of a matrix."""
        return self._rows.mT @ (self._rows @ vectors)

    def largest(self) -> float:
        """Return the largest eigenvalue."""
        return _largest(self._gram)

    def inverse(self, damping: float) -> Inverse:
        """Return the inverse of it plus a multiple of the identity, by Woodbury's identity."""
        self._require_told_apart(damping)
        root = damped_root(self._gram, damping)

        def solve(vectors: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
            inner = torch.cholesky_solve((self._rows @ vectors.mT).double(), root)
            return (vectors - inner.mT.to(vectors) @ self._rows) / damping

        return solve

    def _require_told_apart(self, damping: float) -> None:
        least = _TOLD_APART * torch.finfo(self.dtype).eps * self.largest()
        if damping < least:
            raise ValueError(
                f"Damping {damping:.3g} is next to nothing beside the curvature's largest "
                f"eigenvalue, in {self.dtype}; expected {least:.2g} at least. Give more, or take "
                "`model.double()` and such data."
            )


class DenseCurvature:
    """A curvature that is written down, since there are more rows than parameters.

    Args:
        rows: Their outer products sum to it; batch by batch.
        d: Number of parameters.
    """

    def __init__(self, rows: Iterable[Float[Tensor, "n d"]], d: int) -> None:
        parts = _gathered(rows)
        first = next(parts)
        self._matrix = (first.mT @ first).double()
        for part in parts:
            self._matrix += part.mT @ part
        self.shape, self.device, self.dtype = (d, d), first.device, first.dtype

    def __matmul__(self, vectors: Float[Tensor, "d n"]) -> Float[Tensor, "d n"]:
        """Return the product with the columns of a matrix."""
        return (self._matrix @ vectors.double()).to(vectors)

    def largest(self) -> float:
        """Return the largest eigenvalue."""
        return _largest(self._matrix)

    def inverse(self, damping: float) -> Inverse:
        """Return the inverse of it plus a multiple of the identity."""
        root = damped_root(self._matrix, damping)
        return lambda vectors: torch.cholesky_solve(vectors.mT.double(), root).mT.to(vectors)


def _stacked(batches: Iterable[Float[Tensor, "n d"]], m: int) -> Float[Tensor, "m d"]:
    """Return the rows of all batches: collected in place, as there is room for them only once."""
    start, found = 0, torch.empty(0)
    for rows in batches:
        found = found if start else rows.new_empty(m, rows.shape[1])
        found[start : start + len(rows)] = rows
        start += len(rows)
    return found[:start]


def _finite(
    batches: Iterable[Float[Tensor, "n d"]], argument: str
) -> Iterator[Float[Tensor, "n d"]]:
    for rows in batches:
        require_finite(
            rows,
            f"The curvature of `{argument}`",
            "Look for NaN or infinity in its samples, and in the weights.",
        )
        yield rows


def _gathered(batches: Iterable[Float[Tensor, "n d"]]) -> Iterator[Float[Tensor, "m d"]]:
    """Yield the rows of several batches at once: a matrix is added to for each."""
    waiting: list[Tensor] = []
    for batch in batches:
        waiting.append(batch)
        if sum(map(len, waiting)) >= _AT_ONCE:
            yield torch.cat(waiting)
            waiting = []
    if waiting:
        yield torch.cat(waiting)


def _largest(matrix: Float[Tensor, "m m"]) -> float:
    if len(matrix) < _SMALL:
        return float(torch.linalg.eigvalsh(matrix)[-1])
    start = torch.randn(len(matrix), 1, generator=torch.Generator().manual_seed(0))
    values, _ = torch.lobpcg(matrix, X=start.to(matrix), tol=1e-6)
    return float(values[0])
