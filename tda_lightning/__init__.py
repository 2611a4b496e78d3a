"""Training data attribution for PyTorch Lightning: which samples made the model do that."""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING

# Record
from tda_lightning.gradients.nodes import node_rule
from tda_lightning.gradients.sketching.projectors import (
    CountSketch,
    DenseProjection,
    Identity,
    Kronecker,
    KroneckerCountSketch,
)
from tda_lightning.passes.queries import record_queries
from tda_lightning.passes.training_data import record
from tda_lightning.stores import HDF5Store
from tda_lightning.stores.snapshots import add_snapshots

# Attribute
from tda_lightning.attribution.attribute import (  # isort: skip
    attribute,
    self_influence,
    top_attributions,
    trajectory,
)
from tda_lightning.attribution import (  # isort: skip
    TRAK,
    GradientSimilarity,
    InfluenceFunction,
    Source,
    TracIn,
    Unrolled,
    embed,
)
from tda_lightning.features import (  # isort: skip
    FeatureSimilarity,
    RepresenterPoint,
    attribute_by_features,
)
from tda_lightning.full_influence import (  # isort: skip
    FullInfluenceFunction,
    attribute_by_gradients,
)
from tda_lightning.passes.losses import sample_losses  # isort: skip
from tda_lightning.passes.targets import LogProbability, Logit, Margin  # isort: skip
from tda_lightning.results import Scores  # isort: skip

if TYPE_CHECKING:
    from tda_lightning.callbacks import ContributionTracker, GradientRecorder, LossRecorder
else:

    def __getattr__(name):
        """Import the callbacks on first use: Lightning takes longer to import than all the rest."""
        if name in {"ContributionTracker", "GradientRecorder", "LossRecorder"}:
            return getattr(import_module("tda_lightning.callbacks"), name)
        if name == "callbacks":
            return import_module("tda_lightning.callbacks")
        raise AttributeError(f"module `tda_lightning` has no attribute `{name}`")


__version__ = version("tda_lightning")

__all__ = [
    "TRAK",
    "ContributionTracker",
    "CountSketch",
    "DenseProjection",
    "FeatureSimilarity",
    "FullInfluenceFunction",
    "GradientRecorder",
    "GradientSimilarity",
    "HDF5Store",
    "Identity",
    "InfluenceFunction",
    "Kronecker",
    "KroneckerCountSketch",
    "LogProbability",
    "Logit",
    "LossRecorder",
    "Margin",
    "RepresenterPoint",
    "Scores",
    "Source",
    "TracIn",
    "Unrolled",
    "add_snapshots",
    "attribute",
    "attribute_by_features",
    "attribute_by_gradients",
    "embed",
    "node_rule",
    "record",
    "record_queries",
    "sample_losses",
    "self_influence",
    "top_attributions",
    "trajectory",
]
