"""Unlearning: weights without the influence of some samples, approximate or by exact retraining."""

from tda_lightning.applications.unlearning.replay import Replay
from tda_lightning.applications.unlearning.rewinding import RewindPlan, rewind_plan
from tda_lightning.applications.unlearning.sampled_retraining import SampledRetraining
from tda_lightning.applications.unlearning.unlearned import Unlearned, unlearn
from tda_lightning.applications.unlearning.weight_updates import (
    FirstOrder,
    SecondOrder,
    UnrolledUpdate,
    WeightUpdate,
)

__all__ = [
    "FirstOrder",
    "Replay",
    "RewindPlan",
    "SampledRetraining",
    "SecondOrder",
    "Unlearned",
    "UnrolledUpdate",
    "WeightUpdate",
    "rewind_plan",
    "unlearn",
]
