"""Preconditioning: coordinates in which an adaptive optimizer is plain gradient descent."""

from tda_lightning.recording.preconditioning.optimizer_preconditioner import (
    GradientCoordinates,
    JointPreconditioner,
    OptimizerPreconditioner,
    can_follow_gradients,
    has_preconditioner,
    is_young,
)
from tda_lightning.recording.preconditioning.second_moments import Gradients, rank_one_factors

__all__ = [
    "GradientCoordinates",
    "Gradients",
    "JointPreconditioner",
    "OptimizerPreconditioner",
    "can_follow_gradients",
    "has_preconditioner",
    "is_young",
    "rank_one_factors",
]
