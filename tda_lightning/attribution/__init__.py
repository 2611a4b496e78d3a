"""Attribution methods: one method, one file that reads like its paper."""

from tda_lightning.attribution.attributor import Attributor, SelfAttributor
from tda_lightning.attribution.similarity import GradientSimilarity
from tda_lightning.attribution.tracin import TracIn

__all__ = ["Attributor", "GradientSimilarity", "SelfAttributor", "TracIn"]
