"""Capture: attach hooks to layers, and hand their gradient factors out while backward runs.

Forward hooks see a layer's input; tensor hooks on its output see the output's gradient. Tensor
hooks, unlike full backward hooks, survive in-place operations behind the layer. Each call of a
layer closes over its own input, so a layer called twice is simply heard twice, and a call that is
recomputed (by activation checkpointing) is heard when its own backward pass runs.
"""

from tda_lightning.gradients.capture.capture import Capture
from tda_lightning.gradients.capture.compiled import recordable
from tda_lightning.gradients.capture.paused import capture_paused

__all__ = ["Capture", "capture_paused", "recordable"]
