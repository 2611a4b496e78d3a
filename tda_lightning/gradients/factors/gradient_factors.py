"""GradientFactors: two operands whose outer products are the gradients."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Int
from torch import Tensor

from tda_lightning.gradients.factors.operands import Operand, Regrouped


@dataclass(frozen=True)
class GradientFactors:
    """Two factors whose outer products, summed over ``s``, are each sample's gradient.

    For an embedding, whose weight is the transpose of a linear map's, the two change places, so
    that ``grad_outputs`` always spans the rows of the weight and ``inputs`` its columns.

    Attributes:
        inputs: What the layer saw, ``(n, s, columns)``.
        grad_outputs: Gradient of the loss with respect to what the layer said, ``(n, s, rows)``.
    """

    inputs: Operand
    grad_outputs: Operand

    @property
    def n(self) -> int:
        """Number of samples."""
        return self.grad_outputs.n

    def regrouped(self, n: int) -> GradientFactors:
        """Return the factors of ``n`` samples, each made of several neighbouring entries."""
        parts = self.n // n
        if parts == 1:
            return self
        return GradientFactors(Regrouped(self.inputs, parts), Regrouped(self.grad_outputs, parts))

    def select(self, samples: Int[Tensor, " m"]) -> GradientFactors:
        """Return the factors of some of the samples."""
        return GradientFactors(self.inputs.select(samples), self.grad_outputs.select(samples))
