"""Neighbors: training samples that coincide with others, and samples that are unlike all others."""

from tda_lightning.applications.neighbors.duplicates import Duplicates, find_duplicates
from tda_lightning.applications.neighbors.outliers import Outliers, find_outliers

__all__ = ["Duplicates", "Outliers", "find_duplicates", "find_outliers"]
