"""Layers: rules for layer types, and the selection of the layers to record.

No other package distinguishes layer types.
"""

# Rules are registered when their modules are imported.
from tda_lightning.gradients.layers import attention, embedding, linear, norms
from tda_lightning.gradients.layers.generic import sample_axis
from tda_lightning.gradients.layers.rule import (
    LayerCall,
    LayerRule,
    find_tensors,
    layer_rule,
    never_draws,
    one_column,
    random_state,
)
from tda_lightning.gradients.layers.selection import (
    BlockSource,
    LayerSelection,
    clean_name,
    select_layers,
)

__all__ = [
    "BlockSource",
    "LayerCall",
    "LayerRule",
    "LayerSelection",
    "attention",
    "clean_name",
    "embedding",
    "find_tensors",
    "layer_rule",
    "linear",
    "never_draws",
    "norms",
    "one_column",
    "random_state",
    "sample_axis",
    "select_layers",
]
