"""Uses of a recorded run: each returns ids with reasons, and changes nothing of the user's."""

from tda_lightning.applications.errors import Errors, explain_errors
from tda_lightning.applications.groups import (
    Gap,
    GroupInfluence,
    MeanLoss,
    Summary,
    WorstGroupLoss,
    attribute_summary,
    influence_by_group,
)
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
from tda_lightning.applications.shortcuts import Shortcut, find_shortcut

__all__ = [
    "Errors",
    "Gap",
    "GroupInfluence",
    "LossHistory",
    "MeanLoss",
    "Mislabeled",
    "Plan",
    "Retrainings",
    "Shortcut",
    "Summary",
    "WorstGroupLoss",
    "attribute_summary",
    "explain_errors",
    "find_mislabeled",
    "find_shortcut",
    "influence_by_group",
    "leave_out",
    "loss_history",
    "random_subsets",
    "retrain",
    "same_data",
]
