r"""Gradient factors: every layer's per-sample gradient as a sum of outer products.

.. math:: G_i = \sum_s \mathtt{grad\_outputs}_{i,s} \, \mathtt{inputs}_{i,s}^\top
   \quad (\text{rows} \times \text{columns})

Either side may be too large to store as a tensor (one-hot tokens, the patches of an image). A side
is therefore an :class:`Operand`, which supports multiplication by a matrix. Code that takes factors
is written once for all layer types.
"""

from tda_lightning.gradients.factors.convolutions import ByChannel, GroupedDense, Patches, Regrouped
from tda_lightning.gradients.factors.gradient_factors import (
    BatchStatistics,
    Dense,
    GradientFactors,
    OneHot,
    Operand,
    outer,
)

__all__ = [
    "BatchStatistics",
    "ByChannel",
    "Dense",
    "GradientFactors",
    "GroupedDense",
    "OneHot",
    "Operand",
    "Patches",
    "Regrouped",
    "outer",
]
