r"""Woodbury: exact inversion of a curvature of sampled labels, with Woodbury's identity.

Labels are drawn from the model's predictions. Their gradients are the rows of :math:`C`, scaled
such that :math:`C^\top C` is the Gauss-Newton matrix on average. See Kunstner et al. (2019),
"Limitations of the Empirical Fisher Approximation for Natural Gradient Descent", section 3.

.. math:: (C^\top C + \delta I)^{-1} = \frac{1}{\delta}
   \left( I - C^\top (C C^\top + \delta I)^{-1} C \right)

The factorized matrix has one row per draw, or one per parameter, whichever are fewer.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from tda_lightning.attribution.linalg import damped_root
from tda_lightning.full_influence.curvature import GaussNewton, ModelCurvature
from tda_lightning.full_influence.objective import Objective
from tda_lightning.full_influence.operators import Operator, require_finite
from tda_lightning.full_influence.solvers import DAMPING_PER_LARGEST, Inverse, Solver
from tda_lightning.stores.arguments import require_limit, require_whole
from tda_lightning.stores.precision import in_double_precision

# Below this size, computing all eigenvalues is faster than iterating for the largest one.
_MIN_ITERATIVE_SIZE = 64
_MIN_GATHERED_ROWS = 1024
# Least damping relative to the largest eigenvalue, in units of the number format's precision. With
# less, scores are off by some percent.
_MIN_RELATIVE_DAMPING = 8


@dataclass(frozen=True)
class Woodbury(Solver):
    """The Gauss-Newton matrix of sampled labels, inverted exactly. The default solver.

    It needs only a few passes over the data, and neither curvlinops nor SciPy.

    Attributes:
        draws: Number of labels to draw for every prediction in total. Along a run, at least one is
            drawn at each snapshot.
        max_gb: Maximum memory, in GB, for rows of the parameters' size and the matrices to solve
            with them. There is one row per sample and draw, or one per parameter, whichever are
            fewer.
    """

    draws: int = 4
    max_gb: float = 8.0

    def __post_init__(self) -> None:
        require_whole("draws", self.draws, least=1)
        require_limit("max_gb", self.max_gb)

    def require(self) -> None:
        """Do nothing: there are no optional dependencies."""

    def operator(self, objective: Objective, curvature: ModelCurvature) -> Operator:
        """Return the curvature of the sampled labels."""
        if curvature != GaussNewton() or objective.sampled is None:
            raise ValueError(
                "`Woodbury` draws the labels of the Gauss-Newton matrix itself; expected "
                f"`curvature=GaussNewton()`, got `{curvature}`. Omit it, or use "
                "`ConjugateGradient()`."
            )
        n_points = len(objective.linearization_points)
        draws = math.ceil(self.draws / n_points)
        m, d = draws * n_points * objective.n, objective.d
        self._require_memory(m, objective)
        # Always close the generator: only then does the model get its own weights back.
        with closing(objective.sampled(draws)) as sampled:
            rows = _checked(sampled, objective.argument)
            return LowRankCurvature(_stacked(rows, m)) if m < d else DenseCurvature(rows, d)

    def default_damping(self, operator: Operator) -> float:
        """Return a fiftieth of the largest eigenvalue."""
        assert isinstance(operator, LowRankCurvature | DenseCurvature)
        return DAMPING_PER_LARGEST * operator.largest_eigenvalue()

    def inverse(self, operator: Operator, damping: float) -> Inverse:
        """Return the inverse of the damped curvature."""
        assert isinstance(operator, LowRankCurvature | DenseCurvature)
        return operator.inverse(damping)

    def _require_memory(self, m: int, objective: Objective) -> None:
        # Rows are at least in single precision.
        d, size = objective.d, max(4, objective.parameters[0].element_size())
        side = min(m, d)
        # The factorized matrix and its root are in double precision.
        gigabytes = (2 * 8 * side**2 + (size * m * d if m < d else 0)) / 1e9
        if gigabytes > self.max_gb:
            raise ValueError(
                f"`Woodbury` would hold {side:,} rows of {d:,} numbers, and the matrices to solve "
                f"with them: {gigabytes:.1f} GB; expected at most {self.max_gb:g}. Increase "
                "`max_gb=`, compute the curvature on fewer samples with `curvature_loader=`, choose"
                " layers with `layers=[...]`, or use `ConjugateGradient()`, which holds no rows."
            )


class LowRankCurvature:
    """A curvature that is stored as its rows, which are fewer than the parameters."""

    def __init__(self, rows: Float[Tensor, "m d"]) -> None:
        self._rows = rows
        # Double precision from here on: with little damping, two large terms nearly cancel.
        self._gram = in_double_precision(rows @ rows.mT)
        self.shape = (rows.shape[1], rows.shape[1])
        self.device, self.dtype = rows.device, rows.dtype

    def __matmul__(self, vectors: Float[Tensor, "d n"]) -> Float[Tensor, "d n"]:
        return self._rows.mT @ (self._rows @ vectors)

    def largest_eigenvalue(self) -> float:
        """Return the largest eigenvalue."""
        return _largest_eigenvalue(self._gram)

    def inverse(self, damping: float) -> Inverse:
        """Return the inverse of the damped curvature, by Woodbury's identity."""
        self._require_precision(damping)
        root = damped_root(self._gram, damping)

        def solve(vectors: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
            inner = torch.cholesky_solve(in_double_precision(self._rows @ vectors.mT), root)
            return (vectors - inner.mT.to(vectors) @ self._rows) / damping

        return solve

    def _require_precision(self, damping: float) -> None:
        precision = torch.finfo(self.dtype).eps
        least = _MIN_RELATIVE_DAMPING * precision * self.largest_eigenvalue()
        if damping < least:
            raise ValueError(
                f"Damping {damping:.3g} is too small relative to the curvature's largest "
                f"eigenvalue, in {self.dtype}; expected at least {least:.2g}. Increase `damping`, "
                "or use `model.double()` and data in double precision."
            )


class DenseCurvature:
    """A curvature that is stored as a matrix: there are at least as many rows as parameters."""

    def __init__(self, rows: Iterable[Float[Tensor, "n d"]], d: int) -> None:
        parts = _gathered(rows)
        first = next(parts)
        self._matrix = in_double_precision(first.mT @ first)
        for part in parts:
            self._matrix += (part.mT @ part).to(self._matrix.device)
        self.shape, self.device, self.dtype = (d, d), first.device, first.dtype

    def __matmul__(self, vectors: Float[Tensor, "d n"]) -> Float[Tensor, "d n"]:
        return (self._matrix @ in_double_precision(vectors)).to(vectors)

    def largest_eigenvalue(self) -> float:
        """Return the largest eigenvalue."""
        return _largest_eigenvalue(self._matrix)

    def inverse(self, damping: float) -> Inverse:
        """Return the inverse of the damped curvature."""
        root = damped_root(self._matrix, damping)

        def solve(vectors: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
            return torch.cholesky_solve(in_double_precision(vectors.mT), root).mT.to(vectors)

        return solve


def _stacked(batches: Iterable[Float[Tensor, "n d"]], m: int) -> Float[Tensor, "m d"]:
    """Return the rows of all batches, collected in place: memory may hold them only once."""
    start, stacked = 0, torch.empty(0)
    for rows in batches:
        stacked = stacked if start else rows.new_empty(m, rows.shape[1])
        stacked[start : start + len(rows)] = rows
        start += len(rows)
    return stacked[:start]


def _checked(
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
    """Yield the rows of several batches together, to update the matrix less often."""
    waiting: list[Tensor] = []
    for batch in batches:
        waiting.append(batch)
        if sum(map(len, waiting)) >= _MIN_GATHERED_ROWS:
            yield torch.cat(waiting)
            waiting = []
    if waiting:
        yield torch.cat(waiting)


def _largest_eigenvalue(matrix: Float[Tensor, "m m"]) -> float:
    if len(matrix) < _MIN_ITERATIVE_SIZE:
        return float(torch.linalg.eigvalsh(matrix)[-1])
    start = torch.randn(len(matrix), 1, generator=torch.Generator().manual_seed(0))
    values, _ = torch.lobpcg(matrix, X=start.to(matrix), tol=1e-6)
    return float(values[0])
