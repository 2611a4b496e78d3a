"""Callbacks: the only rooms that know Lightning."""

from tda_lightning.callbacks.recorder import GradientRecorder
from tda_lightning.callbacks.tracker import ContributionTracker

__all__ = ["ContributionTracker", "GradientRecorder"]
