r"""Similarity in feature space: which training samples look to the model like the query?

.. math:: s(q, i) = \cos(\phi_q, \phi_i), \qquad \langle \phi_q, \phi_i \rangle
   \qquad \text{or} \qquad -\lVert \phi_q - \phi_i \rVert^2

Caruana et al. (1999), "Case-Based Explanation of Non-Case-Based Learning Methods", whose neighbours
are near in the activations of a hidden layer; Hanawa et al. (2021), "Evaluation of Similarity-based
Explanations", section 2.2. Labels play no part: a neighbour with another label is a neighbour.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from tda_lightning.attribution.point_methods import PointAttributor
from tda_lightning.linalg import unit_rows
from tda_lightning.points import Points
from tda_lightning.scores import Scores


@dataclass(frozen=True)
class FeatureSimilarity(PointAttributor):
    """Similarity of what a layer sees of two samples.

    Attributes:
        layer: Name of the layer whose inputs are the features; by default the last ``Linear`` that
            is called.
        measure: ``"cosine"``, ``"dot"`` for the inner product, or ``"euclidean"`` for the negative
            squared distance, which is never positive.
    """

    layer: str | None = None
    measure: Literal["cosine", "dot", "euclidean"] = "cosine"

    def attribute(self, train: Points, queries: Points) -> Scores:
        """Score every training sample for every query.

        Args:
            train: The training samples, as the layer saw them.
            queries: The queries, as the layer saw them.

        Raises:
            ValueError: If the layer saw features of another number in the queries.
        """
        if train.features.shape[1] != queries.features.shape[1]:
            raise ValueError(
                f"`{train.layer}` saw {train.features.shape[1]} numbers of every training sample "
                f"and {queries.features.shape[1]} of every query; expected as many. Pad them "
                "alike, or name a layer behind the pooling."
            )
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
        if self.measure == "cosine":
            return unit_rows(queries) @ unit_rows(train).mT
        if self.measure == "dot":
            return queries @ train.mT
        exact = "donot_use_mm_for_euclid_dist"
        return -torch.cdist(queries, train, compute_mode=exact).square()
