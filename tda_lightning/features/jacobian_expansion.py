r"""Representer points without a refit, by expanding the gradient of the last layer's loss.

Take one step up the loss from the given weights :math:`W`, to :math:`W^\dagger`. If :math:`W` is
a stationary point, Newton's step from :math:`W^\dagger` leads back to it, and that step is a mean
over training samples,

.. math:: W \approx \sum_i \Theta_i, \qquad \Theta_i = \frac{1}{n} \left( W^\dagger
   - H^{-1} \frac{\partial L(x_i, y_i)}{\partial \Phi(x_i)} \phi_i^\top \right), \qquad
   \Phi(x_t) \approx \sum_i \Theta_i \phi_t

with :math:`H` and the gradients at :math:`W^\dagger`. Sui et al. (2021), "Representer Point
Selection via Local Jacobian Expansion for Post-hoc Classifier Explanation of Deep Neural Networks
and Ensemble Models", with their one-step :math:`W^\dagger`; here for any
number of outputs, and with as much damping as the Hessian of a softmax needs to have an inverse.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from tda_lightning.arguments import require_not_negative
from tda_lightning.attribution.linalg import damped_root
from tda_lightning.features.attributor import (
    LayerFeatureAttributor,
    head_of,
    require_same_layer,
)
from tda_lightning.features.layer_features import LayerFeatures
from tda_lightning.features.losses import (
    HeadLoss,
    Output,
    loss_of_head,
    output_directions,
    require_output,
)
from tda_lightning.results.scores import Scores


@dataclass(frozen=True)
class LocalJacobianExpansion(LayerFeatureAttributor):
    r"""What each training sample adds to an output of the last layer as it is.

    A positive score marks a proponent: it raises that output. Memory: three matrices of
    :math:`cd \times cd` numbers for :math:`c` outputs and :math:`d` features, two of :math:`cd`
    numbers for each query, and a few times the features and outputs.

    Attributes:
        output: Which output of a query: that of its label, of the model's prediction, or that with
            an index; ``"loss"`` weights all of them by how they lower the query's loss.
        ascent: Learning rate of the step up the loss.
        damping: Added to the diagonal of the Hessian, as a multiple of the diagonal's mean.
        layer: Name of the layer; by default the last ``Linear`` that is called.
    """

    output: Output = "label"
    ascent: float = 0.01
    damping: float = 1e-3
    layer: str | None = None
    reads: ClassVar[Literal["features", "head"]] = "head"

    def __post_init__(self) -> None:
        """Raise unless every argument is one that can be."""
        require_output(self.output)
        require_not_negative("ascent", self.ascent)
        require_not_negative("damping", self.damping)

    def attribute(self, train: LayerFeatures, queries: LayerFeatures) -> Scores:
        """Score every training sample for every query.

        Args:
            train: The training samples, as the layer saw them.
            queries: The queries, as the layer saw them.
        """
        head, asked = head_of("train", train), head_of("queries", queries)
        require_same_layer(queries, train.layer, train.features.shape[1])
        features, n = train.features.double(), len(train.features)
        loss = loss_of_head(head, train.layer)
        slope = loss.gradients(features @ head.weight.mT).mT @ features / n
        weight = head.weight + self.ascent * slope
        outputs = features @ weight.mT
        directions = output_directions(asked, loss_of_head(asked, queries.layer), self.output)
        phi = queries.features.double()
        wanted = directions[:, :, None] * phi[:, None, :]  # (n_query, c, d)
        root = damped_root(*self._hessian(loss, features, outputs))
        solved = torch.cholesky_solve(wanted.flatten(1).mT, root).mT.reshape(wanted.shape)
        shared = (directions * (phi @ weight.mT)).sum(dim=1, keepdim=True)  # (n_query, 1)
        return Scores(
            values=(shared - _products(solved, loss.gradients(outputs), features)) / n,
            query_ids=queries.ids,
            train_ids=train.ids,
            method=repr(self),
            provenance={"layer": train.layer, "output": str(self.output)},
        )

    def _hessian(
        self, loss: HeadLoss, features: Float[Tensor, "n d"], outputs: Float[Tensor, "n c"]
    ) -> tuple[Float[Tensor, "cd cd"], float]:
        """Return the Hessian of the mean loss at the weights, and the damping."""
        (n, d), c = features.shape, outputs.shape[1]
        hessian = features.new_empty(c, d, c, d)
        for column in range(c):
            way = torch.zeros_like(outputs)
            way[:, column] = 1
            hessian_product = (
                loss.hessian_product(outputs, way) / n
            )  # (n, c): a column of every sample's Hessian
            for row in range(column, c):
                block = (features * hessian_product[:, row, None]).mT @ features
                hessian[row, :, column, :] = hessian[column, :, row, :] = block
        square = hessian.reshape(c * d, c * d)
        return square, self.damping * float(square.diagonal().mean())


def _products(
    solved: Float[Tensor, "n_query c d"],
    gradients: Float[Tensor, "n c"],
    features: Float[Tensor, "n d"],
) -> Float[Tensor, "n_query n"]:
    """Return the inner products with every sample's gradient with respect to the weights."""
    rows = [(features @ one.mT * gradients).sum(dim=1) for one in solved]
    return torch.stack(rows)
