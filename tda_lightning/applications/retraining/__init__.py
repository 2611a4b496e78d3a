"""Ground truth: retrain on subsets or with other weights, and measure what changes."""

from tda_lightning.applications.retraining.plan import Plan, leave_out, random_subsets, same_data
from tda_lightning.applications.retraining.removal import Retrain, check_removal
from tda_lightning.applications.retraining.results import Retrainings
from tda_lightning.applications.retraining.runner import retrain

__all__ = [
    "Plan",
    "Retrain",
    "Retrainings",
    "check_removal",
    "leave_out",
    "random_subsets",
    "retrain",
    "same_data",
]
