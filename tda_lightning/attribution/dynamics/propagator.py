r"""Propagators: what a step takes away from a displacement that was there before it.

Along an eigenvector of the step's curvature with eigenvalue :math:`\lambda`, gradient descent at
rate :math:`\eta` leaves :math:`1 - \eta \lambda`. One batch sees more curvature than the whole data
set has, so :math:`\eta \lambda` exceeds 1 often, and 2 at times, where a product of many such
factors explodes. A propagator is a rule :math:`\varphi(\eta \lambda) \in [0, 1]` that does not:
whatever the steps, no displacement grows. It acts through the curvature that it leaves,

.. math:: \tilde \lambda = \frac{1 - \varphi(\eta \lambda)}{\eta} \le \frac{1}{\eta}

With momentum :math:`\mu`, overshoot is judged by the rate :math:`\eta / \sqrt{1 - \mu}`, so that
:math:`\eta \tilde \lambda \le \sqrt{1 - \mu}`. Each step is then well inside the stability regions
of heavy ball and of Nesterov's momentum. Steps that take turns can still pump a displacement up, as
one pumps a swing, but those drawn at random did not: with :math:`\eta \tilde \lambda \le 1` they
did, by many orders of magnitude (``tests/test_unrolled.py``).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from tda_lightning.arguments import require_limit


class Propagator(ABC):
    r"""A rule for what a step takes away along an eigenvector: :math:`1 - \varphi(x)`."""

    @abstractmethod
    def taken(self, x: Float[Tensor, " m"]) -> Float[Tensor, " m"]:
        """Return the share taken away where learning rate times eigenvalue is ``x``."""

    @abstractmethod
    def linear_up_to(self) -> float:
        """Return the largest ``x`` up to which ``x`` itself is taken away."""


@dataclass(frozen=True)
class Linear(Propagator):
    """Exactly what gradient descent takes away, until it overshoots.

    Attributes:
        limit: Where the rule stops following. At 1 nothing is left where a step overshoots; up to 2
            signs turn, as in real training; beyond, products can explode.
    """

    limit: float = 1.0

    def __post_init__(self) -> None:
        """Raise unless the rule takes something away."""
        require_limit("limit", self.limit)

    def taken(self, x: Float[Tensor, " m"]) -> Float[Tensor, " m"]:
        """Return ``x``, or the limit if that is less."""
        return x.clamp(max=self.limit)

    def linear_up_to(self) -> float:
        """Return the limit."""
        return self.limit


@dataclass(frozen=True)
class Exponential(Propagator):
    """What a continuous descent would take away: never all."""

    def taken(self, x: Float[Tensor, " m"]) -> Float[Tensor, " m"]:
        """Return ``1 - exp(-x)``."""
        return -torch.expm1(-x)

    def linear_up_to(self) -> float:
        """Return 0."""
        return 0.0


class TamedCurvature:
    r"""The curvature :math:`C^\top C` of a step, as far as a propagator follows it.

    It works in the row space of the factor :math:`C`, through the eigenvectors of its small Gram
    matrix; where no eigenvalue can be too large, it does not even compute those.

    Args:
        rows: The rows of the factor, before they are scaled, shape ``(m, k)``.
        scales: What to scale each by, shape ``(m,)``.
        rate: The rate that decides what overshoots.
        propagator: The rule.
    """

    def __init__(
        self,
        rows: Float[Tensor, "m k"],
        scales: Float[Tensor, " m"],
        rate: float,
        propagator: Propagator,
    ) -> None:
        self._rows, self._scales = rows, scales[:, None]
        gram = (rows @ rows.mT) * self._scales * scales
        self._taming = _taming(gram, rate, propagator)

    def pull_(self, displacements: Float[Tensor, "k n"], seen: Float[Tensor, "m n"]) -> None:
        """Subtract from ``displacements`` the curvature's product with some vectors.

        Args:
            displacements: Changed in place, in columns, shape ``(k, n)``.
            seen: Products of the rows, before they are scaled, with those vectors.
        """
        inner = self._scales * seen
        if self._taming is not None:
            inner = self._taming @ inner
        displacements.addmm_(self._rows.mT, self._scales * inner, alpha=-1)


def _taming(
    gram: Float[Tensor, "m m"], rate: float, propagator: Propagator
) -> Float[Tensor, "m m"] | None:
    """Return the matrix to put between the factors, or ``None`` for the identity."""
    # The fourth root of the sum of their fourth powers: no eigenvalue is larger.
    bound = float((gram @ gram).norm()) ** 0.5
    if rate * bound <= propagator.linear_up_to():
        return None
    eigenvalues, vectors = torch.linalg.eigh(gram)
    x = rate * eigenvalues.clamp_min(torch.finfo(gram.dtype).eps * bound)
    taming: Tensor = (vectors * (propagator.taken(x) / x)) @ vectors.mT
    return taming
