"""Influence functions of small models with full gradients, without sketches.

The curvature is a linear operator on vectors of all parameters. It is multiplied with, and rarely
formed as a matrix. ``Woodbury``, the default solver, has no optional dependency; ``EKFAC`` needs
curvlinops, and the others SciPy.
"""

from tda_lightning.full_influence.attribute import attribute_by_gradients
from tda_lightning.full_influence.curvature import GaussNewton, Hessian, ModelCurvature
from tda_lightning.full_influence.influence import FullInfluenceFunction
from tda_lightning.full_influence.objective import CURRENT_WEIGHTS, LinearizationPoint, Objective
from tda_lightning.full_influence.solvers import (
    EKFAC,
    ConjugateGradient,
    Lanczos,
    Neumann,
    Solver,
    require_operators,
)
from tda_lightning.full_influence.woodbury import Woodbury

__all__ = [
    "CURRENT_WEIGHTS",
    "EKFAC",
    "ConjugateGradient",
    "FullInfluenceFunction",
    "GaussNewton",
    "Hessian",
    "Lanczos",
    "LinearizationPoint",
    "ModelCurvature",
    "Neumann",
    "Objective",
    "Solver",
    "Woodbury",
    "attribute_by_gradients",
    "require_operators",
]
