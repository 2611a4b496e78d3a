"""Callbacks: the only package that imports Lightning."""

from tda_lightning.callbacks.contribution_tracker import ContributionTracker
from tda_lightning.callbacks.gradient_recorder import GradientRecorder

__all__ = ["ContributionTracker", "GradientRecorder"]
