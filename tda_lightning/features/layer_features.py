"""Layer features: the inputs of one layer per sample, with its outputs and the loss's gradients.

Methods that compare the layer features of queries and training samples have the base class
:class:`LayerFeatureAttributor`. No recorded run is needed.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tda_lightning.results.scores import Scores


@dataclass(frozen=True)
class HeadOutputs:
    """Outputs of the linear layer that reads the features, and gradients of the loss there.

    The gradients at two outputs per sample determine the loss, however well the model fits.

    Attributes:
        outputs: Outputs of the layer, shape ``(n, c)``.
        gradients: Gradient of each sample's own loss with respect to them, shape ``(n, c)``.
        probes: Other outputs, drawn at random, shape ``(n, c)``.
        probe_gradients: Gradient of each sample's own loss at the probes, shape ``(n, c)``.
        weight: Weight of the layer, with any bias as last column, shape ``(c, d)``.
        rounding: Relative rounding error of the number format of the gradients.
    """

    outputs: Float[Tensor, "n c"]
    gradients: Float[Tensor, "n c"]
    probes: Float[Tensor, "n c"]
    probe_gradients: Float[Tensor, "n c"]
    weight: Float[Tensor, "c d"]
    rounding: float

    def at(self, positions: Int[Tensor, " m"]) -> HeadOutputs:
        """Return the head outputs of some of the samples."""
        selected: dict[str, Any] = {name: getattr(self, name)[positions] for name in _PER_SAMPLE}
        return replace(self, **selected)

    def double(self) -> HeadOutputs:
        """Return the head outputs in float64."""
        converted: dict[str, Any] = {name: getattr(self, name).double() for name in _PER_SAMPLE}
        return replace(self, weight=self.weight.double(), **converted)


_PER_SAMPLE = ("outputs", "gradients", "probes", "probe_gradients")


@dataclass(frozen=True)
class LayerFeatures:
    """Features of samples at one layer.

    Attributes:
        features: Inputs of the layer, flattened, shape ``(n, d)``. With the head outputs of a layer
            that has a bias, the last feature is one.
        ids: Ids of the samples, shape ``(n,)``.
        layer: Name of the layer.
        head: Outputs of the layer, if they were requested.
    """

    features: Float[Tensor, "n d"]
    ids: Int[Tensor, " n"]
    layer: str
    head: HeadOutputs | None = None

    def sorted(self) -> LayerFeatures:
        """Return the same features, sorted by id."""
        order = self.ids.argsort()
        head = None if self.head is None else self.head.at(order)
        return replace(self, features=self.features[order], ids=self.ids[order], head=head)

    def first_non_finite(self) -> tuple[str, int] | None:
        """Return a description of the values with NaN or infinity, and the first such sample."""
        tensors = {f"the input of `{self.layer}`": self.features}
        if self.head is not None:
            tensors[f"the output of `{self.layer}`"] = self.head.outputs
            tensors["the gradient of the loss"] = self.head.gradients
        for description, values in tensors.items():
            bad_ids = self.ids[~values.isfinite().all(dim=1)]
            if len(bad_ids):
                return description, int(bad_ids[0])
        return None


def concatenate(
    parts: Sequence[LayerFeatures], ids: Int[Tensor, " n"] | None, argument: str
) -> LayerFeatures:
    """Concatenate the layer features of the batches of an argument; ids are positions by default.

    Raises:
        ValueError: If their numbers of features differ.
    """
    widths = {part.features.shape[1] for part in parts}
    if len(widths) > 1:
        raise ValueError(
            f"The samples of `{argument}` have {sorted(widths)} features at `{parts[0].layer}`; "
            "expected the same number for all. Pad all batches to the same length, or name a "
            "layer after the pooling."
        )
    heads = [part.head for part in parts if part.head is not None]
    head = None
    if heads:
        joined: dict[str, Any] = {
            name: torch.cat([getattr(head, name) for head in heads]) for name in _PER_SAMPLE
        }
        head = replace(heads[0], **joined)
    features = torch.cat([part.features for part in parts])
    all_ids = torch.arange(len(features)) if ids is None else ids
    return LayerFeatures(features, all_ids, parts[0].layer, head)


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
    """Check that an argument holds layer features, and is not a batch."""
    if not isinstance(layer_features, LayerFeatures):
        raise ValueError(
            f"`{name}` is a {type(layer_features).__name__}; expected layer features, as "
            "`train_features(model, loader)` or `query_features(model, batch)` of "
            "`tda_lightning.features` return them. Representer points need `reads='head'`. To "
            "pass batches, call `attribute_by_features`."
        )


def require_same_layer(queries: LayerFeatures, layer: str, width: int) -> None:
    """Check that queries have features of the same layer and width as the training samples."""
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
    """Return the head outputs of an argument that holds layer features, in float64.

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
