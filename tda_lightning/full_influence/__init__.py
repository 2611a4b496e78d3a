"""Parameter space: influence functions of small models with whole gradients, nothing sketched.

Curvature is a linear operator on vectors as long as the model has parameters; it is multiplied
with, and rarely written down. Operators and solvers are those of curvlinops and SciPy, an extra,
but for ``Woodbury``, which does without.
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
