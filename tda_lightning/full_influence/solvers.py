r"""Solvers of :math:`(H + \delta I) x = v`, where :math:`H` is only ever multiplied with.

======================  ====================================================================
`Woodbury`              exact, for a curvature of sampled labels; in a file of its own
`ConjugateGradient`     exact to a tolerance; the number of products grows with the root of
                        the condition number
`Neumann`               the series :math:`\sum_j (I - \alpha (H + \delta I))^j`, with all the
                        data in every term; Agarwal et al. (2017), "Second-Order Stochastic
                        Optimization for Machine Learning in Linear Time" (LiSSA)
`Lanczos`               the largest eigenvalues alone; Schioppa et al. (2022), "Scaling Up
                        Influence Functions", by Arnoldi's iteration, which is Lanczos' for
                        symmetric matrices
`EKFAC`                 another matrix, which is inverted at once: a Kronecker product for each
                        layer, with corrected eigenvalues; George et al. (2018), "Fast
                        Approximate Natural Gradient Descent in a Kronecker-factored
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
from typing import TYPE_CHECKING, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from tda_lightning.arguments import require_choice, require_positive, require_whole
from tda_lightning.full_influence.checks import require_definite
from tda_lightning.full_influence.curvature import GaussNewton, ModelCurvature
from tda_lightning.full_influence.ekfac import KroneckerFactored
from tda_lightning.full_influence.objective import CURRENT_WEIGHTS, Objective

if TYPE_CHECKING:
    from tda_lightning.full_influence.curvlinops_bindings import Operator

SHARE_OF_LARGEST, SHARE_OF_MEAN = 0.02, 0.1
Labels = Literal["all", "sampled"]
Inverse = Callable[[Float[Tensor, "n d"]], Float[Tensor, "n d"]]


class Solver(ABC):
    """A way to solve with a damped curvature, for several right-hand sides at once."""

    def require(self) -> None:
        """Make sure that all it takes is installed: curvlinops and SciPy, by default.

        Raises:
            ImportError: If something is not.
        """
        require_operators()

    def operator(self, objective: Objective, curvature: ModelCurvature) -> Operator:
        """Return the matrix that it solves with: the curvature itself, by default."""
        from tda_lightning.full_influence.operators import seen_from

        found = curvature.operator(objective)
        if objective.linearization_points == (CURRENT_WEIGHTS,):
            return found
        return seen_from(found, objective.model, objective.linearization_points)

    def default_damping(self, operator: Operator) -> float:
        """Return the damping where none is given: by default, a share of the largest eigenvalue.

        Args:
            operator: The matrix, as :meth:`operator` gave it.
        """
        from tda_lightning.full_influence.curvlinops_bindings import eigenpairs

        return SHARE_OF_LARGEST * float(eigenpairs(operator, 1)[0].abs().max())

    @abstractmethod
    def inverse(self, operator: Operator, damping: float) -> Inverse:
        """Return the function from right-hand sides to solutions, both as rows.

        Args:
            operator: The matrix, as :meth:`operator` gave it.
            damping: Added to its diagonal; positive.

        Raises:
            ValueError: Also of that function, if the iteration does not arrive.
        """


@dataclass(frozen=True)
class ConjugateGradient(Solver):
    """Conjugate gradients: as exact as asked for.

    Attributes:
        tolerance: Norm of a residual, relative to its right-hand side, at which it has arrived.
            What rounding leaves is accepted besides, up to the root of the number format's
            precision: 3.5e-4 in single, 1.5e-8 in double precision.
        products: Most products with the curvature, each a few passes over the data.
    """

    tolerance: float = 1e-5
    products: int = 1000

    def __post_init__(self) -> None:
        """Raise unless there is something to arrive at, and a way to go."""
        require_positive("tolerance", self.tolerance)
        require_whole("products", self.products, least=1)

    def inverse(self, operator: Operator, damping: float) -> Inverse:
        """Return the solution by conjugate gradients, with its residual checked."""
        from tda_lightning.full_influence.curvlinops_bindings import conjugate_gradient
        from tda_lightning.full_influence.operators import definite

        whole = definite(operator, damping)

        def solve(rows: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
            solved = conjugate_gradient(whole, rows.mT, self.tolerance, self.products).mT
            limit = self.tolerance + torch.finfo(rows.dtype).eps ** 0.5
            _require_arrived(self, whole, solved, rows, limit)
            return solved

        return solve


@dataclass(frozen=True)
class Neumann(Solver):
    r"""The truncated Neumann series, LiSSA's recursion.

    It is scaled by the largest eigenvalue :math:`\lambda` and the smallest, :math:`\mu`, where that
    is below zero, :math:`\alpha = 2 / (\lambda + \mu + 2 \delta)`, so it converges.

    Attributes:
        remainder: How much of a solution may be missing at most, where ``terms`` is left out.
        terms: Number of terms, each one product; by default as many as the remainder takes.
    """

    remainder: float = 0.01
    terms: int | None = None

    def __post_init__(self) -> None:
        """Raise unless the series has a first term and an end."""
        require_positive("remainder", self.remainder)
        if self.remainder >= 1:
            raise ValueError(
                f"`remainder` is {self.remainder!r}; expected a share of the solution, below 1."
            )
        if self.terms is not None:
            require_whole("terms", self.terms, least=1)

    def inverse(self, operator: Operator, damping: float) -> Inverse:
        """Return the sum of the series, with its residual checked."""
        from tda_lightning.full_influence.curvlinops_bindings import extremes, neumann
        from tda_lightning.full_influence.operators import definite

        lowest, largest = extremes(operator)
        require_definite(lowest, damping)
        both = lowest + largest + 2 * damping
        scale, whole = 2 / both, definite(operator, damping)
        contraction = max((largest - lowest) / both, 1e-12)
        terms = self.terms
        if terms is None:
            terms = math.ceil(math.log(self.remainder) / math.log(contraction))

        def solve(rows: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
            solved = neumann(whole, rows.mT, terms, scale).mT
            # The first term alone leaves the whole right-hand side, at most.
            _require_arrived(self, whole, solved, rows, 1.0 if self.terms else self.remainder)
            return solved

        return solve


@dataclass(frozen=True)
class Lanczos(Solver):
    """The curvature's largest eigenvalues; it is taken to be flat in all other directions.

    Exact if the rank is the curvature's own. Schioppa et al. leave the other directions out instead
    of damping them. Memory: ``rank`` vectors of the parameters' size.

    Attributes:
        rank: Number of eigenvalues.
    """

    rank: int = 64

    def __post_init__(self) -> None:
        """Raise unless there is an eigenvalue to find."""
        require_whole("rank", self.rank, least=1)

    def inverse(self, operator: Operator, damping: float) -> Inverse:
        """Return the inverse of the truncated curvature, damped."""
        from tda_lightning.full_influence.curvlinops_bindings import eigenpairs

        values, vectors = eigenpairs(operator, self.rank)
        require_definite(float(values.min()), damping)
        shrinkage = values / (damping + values)

        def solve(rows: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
            return (rows - (rows @ vectors * shrinkage) @ vectors.mT) / damping

        return solve


@dataclass(frozen=True)
class EKFAC(Solver):
    """Eigenvalue-corrected Kronecker factors of the Gauss-Newton matrix, layer by layer.

    The cheapest, and approximate: layers are taken to be independent. For linear and convolution
    layers; the loss is one cross-entropy, binary cross-entropy or squared error, of outputs of
    shape ``(n, c)``.

    Attributes:
        labels: ``"all"`` takes the expectation over the labels that the model predicts, with a
            backward pass for each output; ``"sampled"`` draws one per sample.
    """

    labels: Labels = "all"

    def __post_init__(self) -> None:
        """Raise unless the labels are of a known kind."""
        require_choice("labels", self.labels, Labels)

    def operator(self, objective: Objective, curvature: ModelCurvature) -> Operator:
        """Return the approximation of the Gauss-Newton matrix."""
        if curvature != GaussNewton():
            raise ValueError(
                f"`EKFAC` approximates the Gauss-Newton matrix of the training step; expected "
                f"`curvature=GaussNewton()`, got `{curvature}`. Leave it out, or take another "
                "solver."
            )
        if objective.linearization_points != (CURRENT_WEIGHTS,):
            raise ValueError(
                "`EKFAC` approximates the curvature at one set of weights; expected no `run=`, got "
                f"one with {len(objective.linearization_points)} snapshots. Leave it out, or take "
                "`Woodbury()`."
            )
        return KroneckerFactored.of(objective, "type-2" if self.labels == "all" else "mc")

    def default_damping(self, operator: Operator) -> float:
        """Return a tenth of the mean eigenvalue, as in Grosse et al. (2023)."""
        assert isinstance(operator, KroneckerFactored)
        return SHARE_OF_MEAN * operator.mean_eigenvalue()

    def inverse(self, operator: Operator, damping: float) -> Inverse:
        """Return the inverse, damped."""
        assert isinstance(operator, KroneckerFactored)
        inverse = operator.inverse(damping)
        return lambda rows: (inverse @ rows.mT).mT


def _require_arrived(
    solver: Solver, whole: Operator, solved: Tensor, rows: Tensor, limit: float
) -> None:
    missing = ((whole @ solved.mT).mT - rows).norm(dim=1)
    residual = float((missing / rows.norm(dim=1).clamp_min(torch.finfo(rows.dtype).tiny)).max())
    if not residual <= limit:  # Also if it is not a number.
        raise ValueError(
            f"`{solver}` has not arrived: a residual of {residual:.2g} is left, expected at most "
            f"{limit:.2g} of the right-hand side. Allow more products or terms, or more damping."
        )


def require_operators() -> None:
    """Load the room that knows curvlinops and SciPy.

    Raises:
        ImportError: If they are not installed, naming what to do.
    """
    importlib.import_module("tda_lightning.full_influence.curvlinops_bindings")
