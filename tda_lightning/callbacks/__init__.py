"""Callbacks: the only rooms that know Lightning."""

from tda_lightning.callbacks.recorder import GradientRecorder

__all__ = ["GradientRecorder"]
