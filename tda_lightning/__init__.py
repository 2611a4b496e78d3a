"""Training data attribution for PyTorch Lightning: which samples made the model do that."""

# Record
from tda_lightning.anew import record
from tda_lightning.callbacks import ContributionTracker, GradientRecorder
from tda_lightning.layers import layer_rule
from tda_lightning.projectors import (
    CountSketch,
    DenseProjection,
    Identity,
    Kronecker,
    KroneckerCountSketch,
)
from tda_lightning.snapshots import add_snapshots

# Ask
from tda_lightning.api import attribute, self_influence, top_attributions, trajectory  # isort: skip
from tda_lightning.by_features import attribute_by_features, representers  # isort: skip
from tda_lightning.by_gradients import attribute_by_gradients  # isort: skip
from tda_lightning.attribution import (  # isort: skip
    TRAK,
    Embedding,
    FeatureSimilarity,
    GradientSimilarity,
    InfluenceFunction,
    LocalJacobianExpansion,
    RepresenterPoint,
    Representers,
    Source,
    TracIn,
    Trajectory,
    Unrolled,
    embed,
)
from tda_lightning.parameter_space import (  # isort: skip
    EKFAC,
    ConjugateGradient,
    FullInfluenceFunction,
    GaussNewton,
    Hessian,
    Lanczos,
    Neumann,
    Woodbury,
)
from tda_lightning.queries import record_queries  # isort: skip
from tda_lightning.targets import LogProbability, Logit, Loss, Margin  # isort: skip
from tda_lightning.contributions import Contributions  # isort: skip
from tda_lightning.scores import Ranking, SampleScores, Scores, TopScores  # isort: skip

# Look inside
from tda_lightning.order import DataOrder, data_order  # isort: skip
from tda_lightning.stores import HDF5Store, MemoryStore, Store  # isort: skip
from tda_lightning.step import Step  # isort: skip

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
