"""Capture: attach hooks to layers, and deliver gradient factors while the backward pass runs.

Forward hooks see a layer's input. Tensor hooks on its output see the output's gradient; unlike full
backward hooks, they survive in-place operations behind the layer. Each call of a layer closes over
its input, so a layer that is called twice delivers factors twice. A call that activation
checkpointing recomputes delivers its factors when its backward pass runs.
"""

from tda_lightning.gradients.capture.capture import Capture
from tda_lightning.gradients.capture.hooks import recordable

__all__ = ["Capture", "recordable"]
