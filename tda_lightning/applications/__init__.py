"""Uses of a recorded run: each returns ids with reasons, and changes nothing of the user's."""

from tda_lightning.applications.loss_history import LossHistory, loss_history
from tda_lightning.applications.mislabel_results import Mislabeled
from tda_lightning.applications.mislabels import find_mislabeled

__all__ = ["LossHistory", "Mislabeled", "find_mislabeled", "loss_history"]
