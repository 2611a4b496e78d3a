"""A loss scale with scripted overflows, and a precision plugin for it on the CPU."""

import torch
from pytorch_lightning.plugins import MixedPrecision


class ScriptedScaler:
    """A loss scale on the CPU that skips given steps, as if their gradients had overflowed."""

    def __init__(self, scales, overflows):
        self.scales, self.overflows, self.number = list(scales), set(overflows), 0

    def get_scale(self):
        return self.scales[self.number]

    def scale(self, loss):
        return loss * self.get_scale()

    def unscale_(self, optimizer):
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad /= self.get_scale()

    def step(self, optimizer, **settings):
        return None if self.number in self.overflows else optimizer.step(**settings)

    def update(self):
        self.number += 1

    def state_dict(self):
        return {"number": self.number}


class Scripted(MixedPrecision):
    """The loss scale of 16-mixed without its autocast, which CPUs support poorly."""

    def __init__(self, scaler):
        self.precision, self.scaler, self.device = "16-mixed", scaler, "cpu"

    def forward_context(self):
        return torch.autocast("cpu", enabled=False)
