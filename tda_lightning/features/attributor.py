"""Base class of methods that compare the layer features of queries and training samples.

They read the features of one layer; no recorded run is needed.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, Literal

from tda_lightning.features.layer_features import HeadOutputs, LayerFeatures
from tda_lightning.results.scores import Scores


class LayerFeatureAttributor(ABC):
    """An attribution method that reads the features of one layer, with its hyper-parameters.

    Attributes:
        layer: Name of the layer whose inputs are the features; by default the last ``Linear`` that
            is called.
        reads: ``"features"``, or ``"head"`` if it also needs the layer's outputs and gradients.
    """

    layer: str | None
    reads: ClassVar[Literal["features", "head"]] = "features"

    @abstractmethod
    def attribute(self, train: LayerFeatures, queries: LayerFeatures) -> Scores:
        """Score every training sample for every query.

        Args:
            train: Layer features of the training samples.
            queries: Layer features of the queries.
        """


def require_layer_features(name: str, layer_features: LayerFeatures) -> None:
    """Validate that an argument holds layer features, and is not a batch.

    Raises:
        ValueError: If it is anything else. The message names the functions that extract features.
    """
    if not isinstance(layer_features, LayerFeatures):
        raise ValueError(
            f"`{name}` is a {type(layer_features).__name__}; expected layer features, as "
            "`train_features(model, loader)` or `query_features(model, batch)` of "
            "`tda_lightning.features` return them. Representer points need `reads='head'`. To "
            "pass batches, call `attribute_by_features`."
        )


def require_same_layer(queries: LayerFeatures, layer: str, width: int) -> None:
    """Validate that queries have features of the same layer and width as the training samples.

    Args:
        queries: Layer features of the queries.
        layer: The layer of the training features.
        width: Number of features per training sample.

    Raises:
        ValueError: If the layer or the number of features differs.
    """
    require_layer_features("queries", queries)
    query_width = queries.features.shape[1]
    if queries.layer != layer or query_width != width:
        raise ValueError(
            f"The training samples have {width} features each, the inputs of `{layer}`. The "
            f"queries have {query_width} features, the inputs of `{queries.layer}`. Expected the "
            "same layer and number. Name the layer with `layer=`; pad all samples to the same "
            "length, or name a layer after the pooling."
        )


def head_of(name: str, layer_features: LayerFeatures) -> HeadOutputs:
    """Return the head outputs of layer features, in float64.

    Args:
        name: Name of the argument, for messages.
        layer_features: Layer features extracted with ``reads="head"``.

    Raises:
        ValueError: If they were extracted without the head outputs.
    """
    require_layer_features(name, layer_features)
    if layer_features.head is None:
        raise ValueError(
            f"The features of `{layer_features.layer}` come without outputs and gradients; "
            "expected both. Extract them with `reads='head'`."
        )
    return layer_features.head.double()
