"""Attribution methods, one per file, each close to the equations of its paper."""

from tda_lightning.attribution.attributor import Attributor, SelfAttributor
from tda_lightning.attribution.averaged import Averaged
from tda_lightning.attribution.dynamics.curvature import (
    BestAvailable,
    Curvature,
    EmpiricalFisher,
    LossWeighted,
    Mixed,
    SampledLabels,
    SampledOrWeighted,
)
from tda_lightning.attribution.dynamics.propagator import Exponential, Linear, Propagator
from tda_lightning.attribution.embedding import embed
from tda_lightning.attribution.gradient_similarity import GradientSimilarity
from tda_lightning.attribution.influence import InfluenceFunction, damping_of
from tda_lightning.attribution.source import Source
from tda_lightning.attribution.tracin import TracIn
from tda_lightning.attribution.trak import TRAK
from tda_lightning.attribution.unrolled import Unrolled
from tda_lightning.results.embedding import Embedding
from tda_lightning.results.trajectory import Trajectory

__all__ = [
    "TRAK",
    "Attributor",
    "Averaged",
    "BestAvailable",
    "Curvature",
    "Embedding",
    "EmpiricalFisher",
    "Exponential",
    "GradientSimilarity",
    "InfluenceFunction",
    "Linear",
    "LossWeighted",
    "Mixed",
    "Propagator",
    "SampledLabels",
    "SampledOrWeighted",
    "SelfAttributor",
    "Source",
    "TracIn",
    "Trajectory",
    "Unrolled",
    "damping_of",
    "embed",
]
