"""Metrics: pure functions that tell whether an attribution is any good."""

from tda_lightning.metrics.agreement import rank_agreement
from tda_lightning.metrics.lds import linear_datamodeling_score
from tda_lightning.metrics.mislabel import mislabel_auc, mislabel_recall

__all__ = ["linear_datamodeling_score", "mislabel_auc", "mislabel_recall", "rank_agreement"]
