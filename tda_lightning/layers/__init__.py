"""Layers: the only rooms that know types of layers."""

# Rules register themselves when their rooms are imported.
from tda_lightning.layers import affine, lookup, norms
from tda_lightning.layers.generic import sample_axis
from tda_lightning.layers.rule import LayerCall, LayerRule, layer_rule, one_column
from tda_lightning.layers.survey import Source, Survey, clean_name, survey
from tda_lightning.layers.tensors import find_tensors

__all__ = [
    "LayerCall",
    "LayerRule",
    "Source",
    "Survey",
    "affine",
    "clean_name",
    "find_tensors",
    "layer_rule",
    "lookup",
    "norms",
    "one_column",
    "sample_axis",
    "survey",
]
