"""Preconditioning: coordinates in which an adaptive optimizer is plain gradient descent."""

from tda_lightning.recording.preconditioning.optimizer_preconditioner import (
    GradientCoordinates,
    JointPreconditioner,
    OptimizerPreconditioner,
    can_follow_gradients,
    has_preconditioner,
)
from tda_lightning.recording.preconditioning.second_moments import Gradients, rank_one_factors

__all__ = [
    "GradientCoordinates",
    "Gradients",
    "JointPreconditioner",
    "OptimizerPreconditioner",
    "can_follow_gradients",
    "has_preconditioner",
    "rank_one_factors",
]
