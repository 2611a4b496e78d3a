"""Preconditioning: coordinates in which an adaptive optimizer is plain gradient descent."""

from tda_lightning.recording.preconditioning.gradient_coordinates import (
    GradientCoordinates,
    can_follow_gradients,
)
from tda_lightning.recording.preconditioning.optimizer_preconditioner import (
    JointPreconditioner,
    OptimizerPreconditioner,
    has_preconditioner,
    rank_one_factors,
)
from tda_lightning.recording.preconditioning.second_moments import Gradients

__all__ = [
    "GradientCoordinates",
    "Gradients",
    "JointPreconditioner",
    "OptimizerPreconditioner",
    "can_follow_gradients",
    "has_preconditioner",
    "rank_one_factors",
]
