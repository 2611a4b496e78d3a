"""Uses of a recorded run: each returns ids with reasons, and changes nothing of the user's."""

from tda_lightning.applications.rewinding import RewindPlan, rewind_plan
from tda_lightning.applications.unlearning import Unlearned, unlearn
from tda_lightning.applications.weight_updates import FirstOrder, SecondOrder, UnrolledUpdate

__all__ = [
    "FirstOrder",
    "RewindPlan",
    "SecondOrder",
    "Unlearned",
    "UnrolledUpdate",
    "rewind_plan",
    "unlearn",
]
