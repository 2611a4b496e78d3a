r"""GradientFactors: the one shape in which every layer's per-sample gradient passes the door.

.. math:: G_i = \sum_s \mathtt{grad\_outputs}_{i,s} \, \mathtt{inputs}_{i,s}^\top
   \quad (\text{rows} \times \text{columns})

Either side may be too large to write down (a one-hot token, the patches of an image), so a side is
known through what it is multiplied with: an :class:`Operand`. Behind this door the mathematics is
written once, and no layer type is mentioned again.
"""

from tda_lightning.gradients.factors.gradient_factors import GradientFactors
from tda_lightning.gradients.factors.operands import (
    Dense,
    GroupedDense,
    OneHot,
    Operand,
    Regrouped,
    WithOnes,
)
from tda_lightning.gradients.factors.patches import Patches

__all__ = [
    "Dense",
    "GradientFactors",
    "GroupedDense",
    "OneHot",
    "Operand",
    "Patches",
    "Regrouped",
    "WithOnes",
]
