"""Attribution from the features of one layer; no recorded run is needed."""

from tda_lightning.features.attribute import attribute_by_features, representers
from tda_lightning.features.extraction import query_features, train_features
from tda_lightning.features.jacobian_expansion import LocalJacobianExpansion
from tda_lightning.features.layer_features import LayerFeatureAttributor
from tda_lightning.features.representer import RepresenterPoint, Representers
from tda_lightning.features.similarity import FeatureSimilarity

__all__ = [
    "FeatureSimilarity",
    "LayerFeatureAttributor",
    "LocalJacobianExpansion",
    "RepresenterPoint",
    "Representers",
    "attribute_by_features",
    "query_features",
    "representers",
    "train_features",
]
