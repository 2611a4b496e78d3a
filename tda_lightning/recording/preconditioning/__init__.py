"""Preconditioning: coordinates in which an adaptive optimizer is plain gradient descent."""

from tda_lightning.recording.preconditioning.joint_preconditioner import (
    JointPreconditioner,
    PartialPreconditioner,
)
from tda_lightning.recording.preconditioning.optimizer_preconditioner import (
    OptimizerPreconditioner,
    has_preconditioner,
    rank_one_factors,
)
from tda_lightning.recording.preconditioning.second_moments import Gradients

__all__ = [
    "Gradients",
    "JointPreconditioner",
    "OptimizerPreconditioner",
    "PartialPreconditioner",
    "has_preconditioner",
    "rank_one_factors",
]
