"""Callbacks: the only package that imports Lightning."""

from tda_lightning.callbacks.gradient_recorder import GradientRecorder
from tda_lightning.callbacks.loss_recorder import LossRecorder
from tda_lightning.callbacks.tracking.contribution_tracker import ContributionTracker
from tda_lightning.callbacks.tracking.training_alarms import TrainingAlarms

__all__ = ["ContributionTracker", "GradientRecorder", "LossRecorder", "TrainingAlarms"]
