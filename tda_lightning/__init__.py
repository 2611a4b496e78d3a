"""Training data attribution for PyTorch Lightning: which samples made the model do that."""

# Record
from tda_lightning.callbacks import ContributionTracker, GradientRecorder
from tda_lightning.gradients.layers import layer_rule
from tda_lightning.gradients.sketching.projectors import (
    CountSketch,
    DenseProjection,
    Identity,
    Kronecker,
    KroneckerCountSketch,
)
from tda_lightning.passes.training_data import record
from tda_lightning.stores.snapshots import add_snapshots

# Ask
from tda_lightning.api import attribute, self_influence, top_attributions, trajectory  # isort: skip
from tda_lightning.features.attribute import attribute_by_features, representers  # isort: skip
from tda_lightning.full_influence.attribute import attribute_by_gradients  # isort: skip
from tda_lightning.attribution import (
    TRAK,
    GradientSimilarity,
    InfluenceFunction,
    Source,
    TracIn,
    Unrolled,
    embed,
)  # isort: skip

from tda_lightning.results.embedding import Embedding  # isort: skip
from tda_lightning.results.trajectory import Trajectory  # isort: skip
from tda_lightning.features import (
    FeatureSimilarity,
    LocalJacobianExpansion,
    RepresenterPoint,
    Representers,
)  # isort: skip

from tda_lightning.full_influence import (  # isort: skip
    EKFAC,
    ConjugateGradient,
    FullInfluenceFunction,
    GaussNewton,
    Hessian,
    Lanczos,
    Neumann,
    Woodbury,
)
from tda_lightning.passes.queries import record_queries  # isort: skip
from tda_lightning.passes.targets import LogProbability, Logit, Loss, Margin  # isort: skip
from tda_lightning.results.contributions import Contributions  # isort: skip
from tda_lightning.results.scores import Ranking, SampleScores, Scores, TopScores  # isort: skip

# Look inside
from tda_lightning.stores.data_order import DataOrder, data_order  # isort: skip
from tda_lightning.stores import HDF5Store, MemoryStore, Store  # isort: skip
from tda_lightning.stores.step import Step  # isort: skip

__all__ = [
    "EKFAC",
    "TRAK",
    "ConjugateGradient",
    "ContributionTracker",
    "Contributions",
    "CountSketch",
    "DataOrder",
    "DenseProjection",
    "Embedding",
    "FeatureSimilarity",
    "FullInfluenceFunction",
    "GaussNewton",
    "GradientRecorder",
    "GradientSimilarity",
    "HDF5Store",
    "Hessian",
    "Identity",
    "InfluenceFunction",
    "Kronecker",
    "KroneckerCountSketch",
    "Lanczos",
    "LocalJacobianExpansion",
    "LogProbability",
    "Logit",
    "Loss",
    "Margin",
    "MemoryStore",
    "Neumann",
    "Ranking",
    "RepresenterPoint",
    "Representers",
    "SampleScores",
    "Scores",
    "Source",
    "Step",
    "Store",
    "TopScores",
    "TracIn",
    "Trajectory",
    "Unrolled",
    "Woodbury",
    "add_snapshots",
    "attribute",
    "attribute_by_features",
    "attribute_by_gradients",
    "data_order",
    "embed",
    "layer_rule",
    "record",
    "record_queries",
    "representers",
    "self_influence",
    "top_attributions",
    "trajectory",
]
