"""Ground truth: retrain on subsets or with other weights, and measure what changes."""

from tda_lightning.applications.retraining.plan import Plan, leave_out, random_subsets, same_data
from tda_lightning.applications.retraining.results import Retrainings
from tda_lightning.applications.retraining.runner import retrain

__all__ = ["Plan", "Retrainings", "leave_out", "random_subsets", "retrain", "same_data"]
