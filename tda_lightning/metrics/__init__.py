"""Metrics that measure how good an attribution is, as pure functions."""

from tda_lightning.metrics.agreement import rank_agreement
from tda_lightning.metrics.lds import linear_datamodeling_score
from tda_lightning.metrics.mislabel import mislabel_auc, mislabel_recall

__all__ = ["linear_datamodeling_score", "mislabel_auc", "mislabel_recall", "rank_agreement"]
