"""Parameter space: influence functions of small models with whole gradients, nothing sketched.

Curvature is a linear operator on vectors as long as the model has parameters; it is multiplied
with, and never written down. Operators and solvers are those of curvlinops and SciPy, an extra.
"""

from tda_lightning.parameter_space.curvature import GaussNewton, Hessian, ModelCurvature
from tda_lightning.parameter_space.extra import require_operators
from tda_lightning.parameter_space.influence import FullInfluenceFunction
from tda_lightning.parameter_space.objective import Objective
from tda_lightning.parameter_space.solvers import (
    EKFAC,
    ConjugateGradient,
    Lanczos,
    Neumann,
    Solver,
)

__all__ = [
    "EKFAC",
    "ConjugateGradient",
    "FullInfluenceFunction",
    "GaussNewton",
    "Hessian",
    "Lanczos",
    "ModelCurvature",
    "Neumann",
    "Objective",
    "Solver",
    "require_operators",
]
