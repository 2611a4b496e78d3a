"""Methods that need no recording: they compare what a layer saw of queries and training samples."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, Literal

from tda_lightning.features.layer_features import HeadOutputs, LayerFeatures
from tda_lightning.results.scores import Scores


class LayerFeatureAttributor(ABC):
    """A method of attribution by the features at one layer, with its hyper-parameters.

    Attributes:
        layer: Name of the layer whose inputs are the features; by default the last ``Linear`` that
            is called.
        reads: What it needs to know of that layer.
    """

    layer: str | None
    reads: ClassVar[Literal["features", "head"]] = "features"

    @abstractmethod
    def attribute(self, train: LayerFeatures, queries: LayerFeatures) -> Scores:
        """Score every training sample for every query.

        Args:
            train: The training samples, as the layer saw them.
            queries: The queries, as the layer saw them.
        """


def require_layer_features(name: str, layer_features: LayerFeatures) -> None:
    """Raise unless an argument is points, and not a batch, say.

    Raises:
        ValueError: Saying where points come from.
    """
    if not isinstance(layer_features, LayerFeatures):
        raise ValueError(
            f"`{name}` is a {type(layer_features).__name__}; expected layer features, as "
            "`train_features(model, loader)` or `query_features(model, batch)` of "
            '`tda_lightning.features` return them; with `reads="head"` for representer points. '
            "`attribute_by_features` takes batches."
        )


def require_same_layer(queries: LayerFeatures, layer: str, width: int) -> None:
    """Raise unless queries are what a layer saw of them, and as many numbers of each.

    Args:
        queries: The queries, as a layer saw them.
        layer: The layer that saw the training samples.
        width: How many numbers of each it saw.

    Raises:
        ValueError: If they are not.
    """
    require_layer_features("queries", queries)
    found = queries.features.shape[1]
    if queries.layer != layer or found != width:
        raise ValueError(
            f"The training samples are {width} numbers each that `{layer}` saw, the queries "
            f"{found} that `{queries.layer}` saw; expected as many, of the same layer. Name it "
            "with `layer=`; pad samples alike, or name a layer behind the pooling."
        )


def head_of(name: str, layer_features: LayerFeatures) -> HeadOutputs:
    """Return the layer itself, in float64.

    Args:
        name: The argument that the points are, for messages.
        layer_features: With the layer.

    Raises:
        ValueError: If it was not taken.
    """
    require_layer_features(name, layer_features)
    if layer_features.head is None:
        raise ValueError(
            f"The features of `{layer_features.layer}` come without outputs and gradients; "
            "expected both. Extract them with `reads='head'`."
        )
    return layer_features.head.double()
