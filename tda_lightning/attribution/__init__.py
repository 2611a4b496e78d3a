"""Attribution methods: one method, one file that reads like its paper."""

from tda_lightning.attribution.attributor import Attributor, SelfAttributor
from tda_lightning.attribution.curvature import (
    BestAvailable,
    Curvature,
    EmpiricalFisher,
    LossWeighted,
    Mixed,
    SampledLabels,
    SampledOrEmpirical,
)
from tda_lightning.attribution.embedding import Embedding, embed
from tda_lightning.attribution.feature_similarity import FeatureSimilarity
from tda_lightning.attribution.influence import InfluenceFunction, damping_of
from tda_lightning.attribution.jacobian_expansion import LocalJacobianExpansion
from tda_lightning.attribution.point_methods import PointAttributor
from tda_lightning.attribution.propagator import Exponential, Linear, Propagator
from tda_lightning.attribution.representer import RepresenterPoint, Representers
from tda_lightning.attribution.similarity import GradientSimilarity
from tda_lightning.attribution.source import Source
from tda_lightning.attribution.tracin import TracIn
from tda_lightning.attribution.trajectory import Trajectory
from tda_lightning.attribution.trak import TRAK
from tda_lightning.attribution.unrolled import Unrolled

__all__ = [
    "TRAK",
    "Attributor",
    "BestAvailable",
    "Curvature",
    "Embedding",
    "EmpiricalFisher",
    "Exponential",
    "FeatureSimilarity",
    "GradientSimilarity",
    "InfluenceFunction",
    "Linear",
    "LocalJacobianExpansion",
    "LossWeighted",
    "Mixed",
    "PointAttributor",
    "Propagator",
    "RepresenterPoint",
    "Representers",
    "SampledLabels",
    "SampledOrEmpirical",
    "SelfAttributor",
    "Source",
    "TracIn",
    "Trajectory",
    "Unrolled",
    "damping_of",
    "embed",
]
