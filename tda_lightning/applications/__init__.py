"""Uses of a recorded run: each returns ids with reasons, and changes nothing of the user's."""

from tda_lightning.applications.loss_history import LossHistory, loss_history
from tda_lightning.applications.mislabel_results import Mislabeled
from tda_lightning.applications.mislabels import find_mislabeled
from tda_lightning.applications.retraining import (
    Plan,
    Retrainings,
    leave_out,
    random_subsets,
    retrain,
    same_data,
)

__all__ = [
    "LossHistory",
    "Mislabeled",
    "Plan",
    "Retrainings",
    "find_mislabeled",
    "leave_out",
    "loss_history",
    "random_subsets",
    "retrain",
    "same_data",
]
