r"""Similarity of layer features: which training samples look like the query to the model?

.. math:: s(q, i) = \cos(\phi_q, \phi_i), \qquad \langle \phi_q, \phi_i \rangle
   \qquad \text{or} \qquad -\lVert \phi_q - \phi_i \rVert^2

Caruana et al. (1999), "Case-Based Explanation of Non-Case-Based Learning Methods", who compare the
activations of a hidden layer; Hanawa et al. (2021), "Evaluation of Similarity-based Explanations",
section 2.2. Labels are ignored. No recorded run is needed: one layer's features are enough.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from tda_lightning.attribution.linalg import unit_rows
from tda_lightning.features.layer_features import (
    LayerFeatureAttributor,
    LayerFeatures,
    require_layer_features,
    require_same_layer,
)
from tda_lightning.results.scores import Scores
from tda_lightning.stores.arguments import require_choice

Measure = Literal["cosine", "dot", "euclidean"]


@dataclass(frozen=True)
class FeatureSimilarity(LayerFeatureAttributor):
    """Similarity of two samples' features at one layer.

    Attributes:
        layer: Name of the layer whose inputs are the features; by default the last ``Linear`` that
            is called.
        measure: ``"cosine"``, ``"dot"`` for the inner product, or ``"euclidean"`` for the negative
            squared distance, which is never positive.
    """

    layer: str | None = None
    measure: Measure = "cosine"

    def __post_init__(self) -> None:
        require_choice("measure", self.measure, Measure)

    def attribute(self, train: LayerFeatures, queries: LayerFeatures) -> Scores:
        """Score every training sample for every query.

        Raises:
            ValueError: If the queries' features come from another layer or differ in number.
        """
        require_layer_features("train", train)
        require_same_layer(queries, train.layer, train.features.shape[1])
        return Scores(
            values=self._similarities(queries.features, train.features),
            query_ids=queries.ids,
            train_ids=train.ids,
            method=repr(self),
            provenance={"layer": train.layer},
        )

    def _similarities(
        self, queries: Float[Tensor, "n_query d"], train: Float[Tensor, "n_train d"]
    ) -> Float[Tensor, "n_query n_train"]:
        queries, train = _at_least_float32(queries), _at_least_float32(train)
        if self.measure == "cosine":
            return unit_rows(queries) @ unit_rows(train).mT
        if self.measure == "dot":
            return queries @ train.mT
        exact = "donot_use_mm_for_euclid_dist"
        return -torch.cdist(queries, train, compute_mode=exact).square()


def _at_least_float32(features: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
    # 16 bits are too few for sums of many products, and `cdist` does not support them.
    return features.float() if features.dtype in (torch.float16, torch.bfloat16) else features
