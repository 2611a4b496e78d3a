"""Metrics that measure how good an attribution is, as pure functions."""

from tda_lightning.metrics.agreement import model_randomization, rank_agreement
from tda_lightning.metrics.counterfactual import (
    brittleness,
    kept_without_proponents,
    leave_one_out_correlation,
    removal_curve,
)
from tda_lightning.metrics.detection import class_detection, group_detection
from tda_lightning.metrics.lds import Estimate, datamodeling_interval, linear_datamodeling_score
from tda_lightning.metrics.mislabel import mislabel_auc, mislabel_precision, mislabel_recall
from tda_lightning.metrics.retrieval import (
    mean_reciprocal_rank,
    recall_at_k,
    tail_patch,
    top_k_cardinality,
)

__all__ = [
    "Estimate",
    "brittleness",
    "class_detection",
    "datamodeling_interval",
    "group_detection",
    "kept_without_proponents",
    "leave_one_out_correlation",
    "linear_datamodeling_score",
    "mean_reciprocal_rank",
    "mislabel_auc",
    "mislabel_precision",
    "mislabel_recall",
    "model_randomization",
    "rank_agreement",
    "recall_at_k",
    "removal_curve",
    "tail_patch",
    "top_k_cardinality",
]
