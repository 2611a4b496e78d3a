r"""Representer points without a refit, by expanding the gradient of the last layer's loss.

Take one ascent step on the loss from the given weights :math:`W` to :math:`W^\dagger`. If
:math:`W` is a stationary point, Newton's step from :math:`W^\dagger` leads back to it. That step is
a mean over training samples,

.. math:: W \approx \sum_i \Theta_i, \qquad \Theta_i = \frac{1}{n} \left( W^\dagger
   - H^{-1} \frac{\partial L(x_i, y_i)}{\partial \Phi(x_i)} \phi_i^\top \right), \qquad
   \Phi(x_t) \approx \sum_i \Theta_i \phi_t

with :math:`H` and the gradients at :math:`W^\dagger`. Sui et al. (2021), "Representer Point
Selection via Local Jacobian Expansion for Post-hoc Classifier Explanation of Deep Neural Networks
and Ensemble Models", with their one-step :math:`W^\dagger`. Here the number of outputs is
arbitrary, and damping makes the Hessian of a softmax invertible. No recorded run is needed: the
features of one layer are enough.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from tda_lightning.attribution.linalg import damped_root
from tda_lightning.features.layer_features import (
    LayerFeatureAttributor,
    LayerFeatures,
    head_of,
    require_same_layer,
)
from tda_lightning.features.losses import (
    HeadLoss,
    Output,
    infer_loss,
    output_directions,
    require_output,
)
from tda_lightning.results.scores import Scores
from tda_lightning.stores.arguments import require_not_negative


@dataclass(frozen=True)
class LocalJacobianExpansion(LayerFeatureAttributor):
    r"""Contribution of each training sample to an output of the last layer, without a refit.

    A positive score marks a proponent: it raises that output. Memory for :math:`c` outputs and
    :math:`d` features: three matrices of :math:`cd \times cd` numbers, two of :math:`cd` numbers
    per query, and a few times the features and outputs.

    Attributes:
        output: Which output of a query: its label, the model's prediction, or the output with this
            index. ``"loss"`` weights all outputs by how they lower the query's loss.
        ascent: Learning rate of the ascent step.
        damping: Added to the diagonal of the Hessian, as a multiple of the diagonal's mean.
        layer: Name of the layer; by default the last ``Linear`` that is called.
    """

    output: Output = "label"
    ascent: float = 0.01
    damping: float = 1e-3
    layer: str | None = None
    reads: ClassVar[Literal["features", "head"]] = "head"

    def __post_init__(self) -> None:
        require_output(self.output)
        require_not_negative("ascent", self.ascent)
        require_not_negative("damping", self.damping)

    def attribute(self, train: LayerFeatures, queries: LayerFeatures) -> Scores:
        """Score every training sample for every query."""
        head, query_head = head_of("train", train), head_of("queries", queries)
        require_same_layer(queries, train.layer, train.features.shape[1])
        features, n = train.features.double(), len(train.features)
        loss = infer_loss(head, train.layer)
        query_loss = infer_loss(query_head, queries.layer)
        gradient = loss.gradients(features @ head.weight.mT).mT @ features / n
        weight = head.weight + self.ascent * gradient
        outputs = features @ weight.mT
        directions = output_directions(query_head, query_loss, self.output)
        phi = queries.features.double()
        weight_directions = directions[:, :, None] * phi[:, None, :]  # (n_query, c, d)
        root = damped_root(*self._hessian(loss, features, outputs))
        solved = torch.cholesky_solve(weight_directions.flatten(1).mT, root).mT
        solved = solved.reshape(weight_directions.shape)
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
            unit = torch.zeros_like(outputs)
            unit[:, column] = 1
            # One column of every sample's Hessian with respect to its outputs, (n, c).
            hessian_column = loss.hessian_product(outputs, unit) / n
            for row in range(column, c):
                block = (features * hessian_column[:, row, None]).mT @ features
                hessian[row, :, column, :] = hessian[column, :, row, :] = block
        matrix = hessian.reshape(c * d, c * d)
        return matrix, self.damping * float(matrix.diagonal().mean())


def _products(
    solved: Float[Tensor, "n_query c d"],
    gradients: Float[Tensor, "n c"],
    features: Float[Tensor, "n d"],
) -> Float[Tensor, "n_query n"]:
    """Return the inner products with every sample's gradient with respect to the weights."""
    rows = [(features @ direction.mT * gradients).sum(dim=1) for direction in solved]
    return torch.stack(rows)
