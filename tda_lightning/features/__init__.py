"""Features: attribution by what one layer sees; nothing needs to be recorded."""

from tda_lightning.features.attribute import attribute_by_features, representers
from tda_lightning.features.attributor import PointAttributor
from tda_lightning.features.extraction import query_points, train_points
from tda_lightning.features.jacobian_expansion import LocalJacobianExpansion
from tda_lightning.features.representer import RepresenterPoint, Representers
from tda_lightning.features.similarity import FeatureSimilarity

__all__ = [
    "FeatureSimilarity",
    "LocalJacobianExpansion",
    "PointAttributor",
    "RepresenterPoint",
    "Representers",
    "attribute_by_features",
    "query_points",
    "representers",
    "train_points",
]
