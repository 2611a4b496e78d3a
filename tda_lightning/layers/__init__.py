"""Layers: the only rooms that know types of layers."""

# Rules register themselves when their rooms are imported.
from tda_lightning.layers import affine, attention, lookup, norms
from tda_lightning.layers.generic import sample_axis
from tda_lightning.layers.rule import (
    LayerCall,
    LayerRule,
    layer_rule,
    never_draws,
    one_column,
    random_state,
)
from tda_lightning.layers.survey import Source, Survey, clean_name, survey
from tda_lightning.layers.tensors import find_tensors

__all__ = [
    "LayerCall",
    "LayerRule",
    "Source",
    "Survey",
    "affine",
    "attention",
    "clean_name",
    "find_tensors",
    "layer_rule",
    "lookup",
    "never_draws",
    "norms",
    "one_column",
    "random_state",
    "sample_axis",
    "survey",
]
