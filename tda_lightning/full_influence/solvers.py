r"""Solvers of :math:`(H + \delta I) x = v`; most need only products with :math:`H`.

======================  ====================================================================
`Woodbury`              exact, for a curvature of sampled labels; see ``woodbury.py``
`ConjugateGradient`     exact to a tolerance; the number of products grows with the square root
                        of the condition number
`Neumann`               the series :math:`\sum_j (I - \alpha (H + \delta I))^j`, with all the
                        data in every term; Agarwal et al. (2017), "Second-Order Stochastic
                        Optimization for Machine Learning in Linear Time" (LiSSA)
`Lanczos`               only the largest eigenvalues; Schioppa et al. (2022), "Scaling Up
                        Influence Functions", who use Arnoldi's iteration; for symmetric
                        matrices it is Lanczos' iteration
`EKFAC`                 an approximation of :math:`H` that is inverted directly: a Kronecker
                        product per layer, with corrected eigenvalues; George et al. (2018),
                        "Fast Approximate Natural Gradient Descent in a Kronecker-factored
                        Eigenbasis"; Grosse et al. (2023), "Studying Large Language Model
                        Generalization with Influence Functions"
======================  ====================================================================
"""

from __future__ import annotations

import importlib
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from tda_lightning.attribution.linalg import conjugate_gradient
from tda_lightning.full_influence.curvature import GaussNewton, ModelCurvature
from tda_lightning.full_influence.ekfac import KroneckerFactored
from tda_lightning.full_influence.objective import CURRENT_WEIGHTS, Objective
from tda_lightning.full_influence.operators import (
    Operator,
    damped_definite,
    mean_over_points,
    require_definite,
)
from tda_lightning.stores.arguments import require_choice, require_positive, require_whole

# Default damping, relative to the largest or the mean eigenvalue.
DAMPING_PER_LARGEST, DAMPING_PER_MEAN = 0.02, 0.1
Labels = Literal["all", "sampled"]
Inverse = Callable[[Float[Tensor, "n d"]], Float[Tensor, "n d"]]


class Solver(ABC):
    """Solves linear systems with a damped curvature, for several right-hand sides at once."""

    def require(self) -> None:
        """Check that the solver's dependencies are installed: SciPy, by default.

        Raises:
            ImportError: If a dependency is not installed.
        """
        importlib.import_module("tda_lightning.full_influence.eigenvalues")

    def operator(self, objective: Objective, curvature: ModelCurvature) -> Operator:
        """Return the matrix of the linear system: the curvature itself, by default."""
        operator = curvature.operator(objective)
        if objective.linearization_points == (CURRENT_WEIGHTS,):
            return operator
        return mean_over_points(operator, objective.model, objective.linearization_points)

    def default_damping(self, operator: Operator) -> float:
        """Return the default damping: unless overridden, a fiftieth of the largest eigenvalue."""
        from tda_lightning.full_influence.eigenvalues import eigenpairs

        return DAMPING_PER_LARGEST * float(eigenpairs(operator, 1)[0].abs().max())

    @abstractmethod
    def inverse(self, operator: Operator, damping: float) -> Inverse:
        """Return a function from right-hand sides to solutions, both as rows.

        Raises:
            ValueError: If the damped matrix is not positive definite. The returned function also
                raises it, if the iteration does not converge.
        """


@dataclass(frozen=True)
class ConjugateGradient(Solver):
    """Conjugate gradients, exact to a tolerance.

    Attributes:
        tolerance: Norm of a residual, relative to its right-hand side, at which the iteration has
            converged. Rounding errors are accepted in addition, up to the square root of the number
            format's precision: 3.5e-4 in single, 1.5e-8 in double precision.
        products: Maximum number of products with the curvature, each a few passes over the data.
    """

    tolerance: float = 1e-5
    products: int = 1000

    def __post_init__(self) -> None:
        require_positive("tolerance", self.tolerance)
        require_whole("products", self.products, least=1)

    def inverse(self, operator: Operator, damping: float) -> Inverse:
        """Return a function that solves by conjugate gradients and checks the residual."""
        damped = damped_definite(operator, damping)

        def solve(rows: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
            # With a margin: the true residual, checked below, has rounding errors in addition.
            product, tolerance = damped.__matmul__, 0.1 * self.tolerance
            solved = conjugate_gradient(product, rows.mT, tolerance, self.products).mT
            limit = self.tolerance + torch.finfo(rows.dtype).eps ** 0.5
            _require_converged(self, damped, solved, rows, limit)
            return solved

        return solve


@dataclass(frozen=True)
class Neumann(Solver):
    r"""The truncated Neumann series, LiSSA's recursion.

    It converges, since it is scaled by :math:`\alpha = 2 / (\lambda + \mu + 2 \delta)`. Here
    :math:`\lambda` is the largest eigenvalue, and :math:`\mu` the smallest or 0, if that is less.

    Attributes:
        remainder: Largest share of a solution that may be missing; used if ``terms`` is ``None``.
        terms: Number of terms, each one product; by default, enough for ``remainder``.
    """

    remainder: float = 0.01
    terms: int | None = None

    def __post_init__(self) -> None:
        require_positive("remainder", self.remainder)
        if self.remainder >= 1:
            raise ValueError(
                f"`remainder` is {self.remainder!r}; expected a share of the solution, below 1."
            )
        if self.terms is not None:
            require_whole("terms", self.terms, least=1)

    def inverse(self, operator: Operator, damping: float) -> Inverse:
        """Return a function that sums the series and checks the residual."""
        from tda_lightning.full_influence.eigenvalues import extremes

        lowest, largest = extremes(operator)
        require_definite(lowest, damping)
        total = lowest + largest + 2 * damping
        scale, damped = 2 / total, damped_definite(operator, damping)
        contraction = max((largest - lowest) / total, 1e-12)
        terms = self.terms
        if terms is None:
            terms = math.ceil(math.log(self.remainder) / math.log(contraction))

        def solve(rows: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
            term = solved = scale * rows
            for _ in range(terms):
                term = term - scale * (damped @ term.mT).mT
                solved = solved + term
            # Even the first term alone leaves at most the norm of the right-hand side.
            _require_converged(self, damped, solved, rows, 1.0 if self.terms else self.remainder)
            return solved

        return solve


@dataclass(frozen=True)
class Lanczos(Solver):
    """The curvature's largest eigenvalues; it is assumed to be zero in all other directions.

    Exact if ``rank`` is the rank of the curvature. Schioppa et al. omit the other directions
    instead of damping them. Memory: ``rank`` vectors of the parameters' size.

    Attributes:
        rank: Number of eigenvalues.
    """

    rank: int = 64

    def __post_init__(self) -> None:
        require_whole("rank", self.rank, least=1)

    def inverse(self, operator: Operator, damping: float) -> Inverse:
        """Return the inverse of the truncated and damped curvature."""
        from tda_lightning.full_influence.eigenvalues import eigenpairs

        values, vectors = eigenpairs(operator, self.rank)
        require_definite(float(values.min()), damping)
        shrinkage = values / (damping + values)

        def solve(rows: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
            return (rows - (rows @ vectors * shrinkage) @ vectors.mT) / damping

        return solve


@dataclass(frozen=True)
class EKFAC(Solver):
    """Eigenvalue-corrected Kronecker factors of the Gauss-Newton matrix, layer by layer.

    The cheapest solver, and approximate: layers are assumed to be independent. It supports linear
    and convolution layers. The loss must be one cross-entropy, binary cross-entropy or squared
    error, of outputs of shape ``(n, c)``.

    Attributes:
        labels: ``"all"`` takes the expectation over the labels that the model predicts, with a
            backward pass for each output; ``"sampled"`` draws one label per sample.
    """

    labels: Labels = "all"

    def __post_init__(self) -> None:
        require_choice("labels", self.labels, Labels)

    def require(self) -> None:
        """Check that curvlinops is installed."""
        require_operators()

    def operator(self, objective: Objective, curvature: ModelCurvature) -> Operator:
        """Return the approximation of the Gauss-Newton matrix."""
        if curvature != GaussNewton():
            raise ValueError(
                f"`EKFAC` approximates the Gauss-Newton matrix of the training step; expected "
                f"`curvature=GaussNewton()`, got `{curvature}`. Omit it, or use another solver."
            )
        points = objective.linearization_points
        if points != (CURRENT_WEIGHTS,):
            along = "gradients that the run's optimizer rescales"
            if points[0].weights is not None:
                along = f"the {len(points)} snapshots of the run"
            raise ValueError(
                f"`EKFAC` approximates the curvature at one set of weights, and not with {along}. "
                "Use `Woodbury()`. `attribute_by_gradients` takes `EKFAC()` without `run=`."
            )
        return KroneckerFactored.of(objective, "type-2" if self.labels == "all" else "mc")

    def default_damping(self, operator: Operator) -> float:
        """Return a tenth of the mean eigenvalue, as in Grosse et al. (2023)."""
        assert isinstance(operator, KroneckerFactored)
        return DAMPING_PER_MEAN * operator.mean_eigenvalue()

    def inverse(self, operator: Operator, damping: float) -> Inverse:
        """Return the inverse of the damped approximation."""
        assert isinstance(operator, KroneckerFactored)
        inverse = operator.inverse(damping)
        return lambda rows: (inverse @ rows.mT).mT


def _require_converged(
    solver: Solver, damped: Operator, solved: Tensor, rows: Tensor, limit: float
) -> None:
    residuals = ((damped @ solved.mT).mT - rows).norm(dim=1)
    norms = rows.norm(dim=1).clamp_min(torch.finfo(rows.dtype).tiny)
    largest = float((residuals / norms).max())
    if not largest <= limit:  # NaN is not.
        raise ValueError(
            f"`{solver}` did not converge: the residual is {largest:.2g} of the right-hand side; "
            f"expected at most {limit:.2g}. Allow more products or terms, or increase `damping`."
        )


def require_operators() -> None:
    """Import the optional dependency curvlinops, which :class:`EKFAC` needs, on first use.

    Raises:
        ImportError: If it is not installed.
    """
    importlib.import_module("tda_lightning.full_influence.curvlinops_bindings")
