r"""Propagators: how much of an earlier displacement a step removes.

Along an eigenvector of the step's curvature with eigenvalue :math:`\lambda`, gradient descent at
rate :math:`\eta` leaves :math:`1 - \eta \lambda` of a displacement. The curvature of one batch
exceeds that of the whole data set. Therefore :math:`\eta \lambda` is often above 1 and sometimes
above 2, and a product of many such factors explodes. A propagator replaces the factor by a rule
:math:`\varphi(\eta \lambda) \in [0, 1]`, with which no displacement grows. In effect, it replaces
the eigenvalue by

.. math:: \tilde \lambda = \frac{1 - \varphi(\eta \lambda)}{\eta} \le \frac{1}{\eta}

With momentum, :math:`\eta` is the rate at which plain gradient descent would move the weights as
far in the end. A product of steps, each stable by itself, can amplify a displacement by resonance.
A limit :math:`1 / \sqrt{1 - \mu}` times as high did so, on random steps
(``tests/attribution/test_unrolled.py``) and on a language model that was trained for long.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import suppress
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from tda_lightning.attribution.linalg import eigendecomposition
from tda_lightning.stores.arguments import require_limit


class Propagator(ABC):
    r"""A rule for the share that a step removes along an eigenvector: :math:`1 - \varphi(x)`."""

    @abstractmethod
    def taken(self, x: Float[Tensor, " m"]) -> Float[Tensor, " m"]:
        """Return the removed share of a displacement, given learning rate times eigenvalue."""

    @abstractmethod
    def linear_up_to(self) -> float:
        """Return the largest ``x`` up to which the removed share is ``x`` itself."""


@dataclass(frozen=True)
class Linear(Propagator):
    """The share that gradient descent removes, up to a limit.

    Attributes:
        limit: Largest share. With 1, a step that overshoots leaves nothing. With up to 2, signs
            change as in real training. Above 2, products can explode; with momentum, above 1.
    """

    limit: float = 1.0

    def __post_init__(self) -> None:
        require_limit("limit", self.limit)

    def taken(self, x: Float[Tensor, " m"]) -> Float[Tensor, " m"]:
        """Return ``x``, but at most the limit."""
        return x.clamp(max=self.limit)

    def linear_up_to(self) -> float:
        """Return the limit."""
        return self.limit


@dataclass(frozen=True)
class Exponential(Propagator):
    """The share that continuous gradient descent removes: always less than 1."""

    def taken(self, x: Float[Tensor, " m"]) -> Float[Tensor, " m"]:
        """Return ``1 - exp(-x)``."""
        return -torch.expm1(-x)

    def linear_up_to(self) -> float:
        """Return 0."""
        return 0.0


class LimitedCurvature:
    r"""The curvature :math:`C^\top C` of a step, with its eigenvalues limited by a propagator.

    It works in the row space of the factor :math:`C`, through the eigenvectors of its small Gram
    matrix. Where no eigenvalue can be too large, these are not computed.

    Args:
        rows: The unscaled rows of the factor.
        scales: The scale of each row.
        rate: The learning rate by which overshoot is judged.
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
        self._inner = _inner_matrix(gram, rate, propagator)

    def subtract_product_(
        self, displacements: Float[Tensor, "k n"], products: Float[Tensor, "m n"]
    ) -> None:
        """Subtract the curvature's product with some vectors, given the rows' products."""
        coefficients = self._scales * products
        if self._inner is not None:
            coefficients = self._inner @ coefficients
        displacements.addmm_(self._rows.mT, self._scales * coefficients, alpha=-1)


def _inner_matrix(
    gram: Float[Tensor, "m m"], rate: float, propagator: Propagator
) -> Float[Tensor, "m m"] | None:
    r"""Return the matrix between :math:`C^\top` and :math:`C`, or ``None`` for the identity."""
    # No eigenvalue exceeds the fourth root of the sum of their fourth powers.
    bound = float((gram @ gram).norm()) ** 0.5
    if rate * bound <= propagator.linear_up_to():
        return None
    eigenvalues, vectors = fast_eigendecomposition(gram)
    x = rate * eigenvalues.clamp_min(torch.finfo(gram.dtype).eps * bound)
    inner: Tensor = (vectors * (propagator.taken(x) / x)) @ vectors.mT
    return inner


def fast_eigendecomposition(
    matrix: Float[Tensor, "k k"],
) -> tuple[Float[Tensor, " k"], Float[Tensor, "k k"]]:
    """Return :func:`eigendecomposition`, in the precision of the matrix where that succeeds.

    For small matrices of many steps: double precision would slow :class:`Unrolled` by a third.
    """
    with suppress(RuntimeError):
        values, vectors = torch.linalg.eigh(matrix)
        if values.isfinite().all() and vectors.isfinite().all():
            return values, vectors
    return eigendecomposition(matrix)
