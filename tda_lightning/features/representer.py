r"""Representer points: outputs as sums over training samples.

Let the last layer :math:`\Phi = \phi W^\top` be at a stationary point of its loss with L2
regularization. Then its weights and outputs are weighted sums over the training samples,

.. math:: \Phi(x_t) = \sum_i \alpha_i \, \langle \phi_i, \phi_t \rangle, \qquad
   \alpha_i = -\frac{1}{2 \lambda n} \frac{\partial L(x_i, y_i)}{\partial \Phi(x_i)}

Yeh et al. (2018), "Representer Point Selection for Explaining Deep Neural Networks", theorem 3.1.
The last layer of a trained model is not at such a point. It is first refitted from its current
weights, with the other layers fixed (section 3.2). The paper uses gradient descent with a line
search; this module uses L-BFGS with one. A bias is the weight of a feature that is always one. No
recorded run is needed: the features of one layer are enough.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tda_lightning.attribution.linalg import conjugate_gradient
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
from tda_lightning.results.sample_scores import SampleScores
from tda_lightning.results.scores import Scores
from tda_lightning.stores.arguments import require_choice, require_positive

Targets = Literal["labels", "predictions"]
# Largest error of the outputs that the decomposition reproduces.
_MAX_OUTPUT_ERROR = 1e-6


@dataclass(frozen=True)
class RepresenterPoint(LayerFeatureAttributor):
    r"""Contribution of each training sample to an output of the refitted last layer.

    A positive score marks a proponent: it raises that output. Scores of a query sum to the output.
    Memory: a few times the features and the outputs of all samples, and sixty times the weight.

    Attributes:
        output: Which output of a query: its label, the model's prediction, or the output with this
            index. ``"loss"`` weights all outputs by how they lower the query's loss.
        targets: Targets of the refit: the labels, or the model's own predictions. Predictions keep
            the refitted model close to the given one (the paper's choice for trained models).
        regularization: The factor :math:`\lambda` of the squared weights.
        layer: Name of the layer; by default the last ``Linear`` that is called.
    """

    output: Output = "label"
    targets: Targets = "labels"
    regularization: float = 3e-3
    layer: str | None = None
    reads: ClassVar[Literal["features", "head"]] = "head"

    def __post_init__(self) -> None:
        require_output(self.output)
        require_choice("targets", self.targets, Targets)
        require_positive("regularization", self.regularization)

    def attribute(self, train: LayerFeatures, queries: LayerFeatures) -> Scores:
        """Score every training sample for every query."""
        _directions(queries, self.output)  # raises before the refit, not after it
        return self.fit(train).attribute(queries, self.output)

    def fit(self, train: LayerFeatures) -> Representers:
        """Refit the last layer and decompose it.

        Raises:
            ValueError: If the loss is neither a softmax cross-entropy nor a squared error, or the
                refit does not converge.
        """
        head, features = head_of("train", train), train.features.double()
        loss = infer_loss(head, train.layer)
        if self.targets == "predictions":
            loss = loss.with_targets_from(head.outputs)
        weight = stationary_weight(loss, features, head.weight, self.regularization)
        gradients = loss.gradients(features @ weight.mT)
        values = -gradients / (2 * self.regularization * len(features))
        return Representers(features, values, train.ids, train.layer, weight, repr(self))


@dataclass(frozen=True)
class Representers:
    r"""A last layer, decomposed into a weighted sum of training samples.

    Attributes:
        features: Features of the training samples, shape ``(n_train, d)``.
        values: Representer values :math:`\alpha`, one per output, shape ``(n_train, c)``.
        train_ids: Ids of the training samples, shape ``(n_train,)``.
        layer: Name of the layer.
        weight: The refitted weight, with any bias as last column, shape ``(c, d)``.
        method: The method and its hyper-parameters.
    """

    features: Float[Tensor, "n_train d"] = field(repr=False)
    values: Float[Tensor, "n_train c"] = field(repr=False)
    train_ids: Int[Tensor, " n_train"] = field(repr=False)
    layer: str
    weight: Float[Tensor, "c d"] = field(repr=False)
    method: str

    def outputs(self, queries: LayerFeatures) -> Float[Tensor, "n_query c"]:
        """Return the outputs of the refitted layer, as sums over training samples."""
        return self._inner_products(queries) @ self.values

    def contributions(self, queries: LayerFeatures) -> Float[Tensor, "n_query n_train c"]:
        """Return the contribution of every training sample to every output of every query."""
        return self._inner_products(queries)[:, :, None] * self.values

    def attribute(self, queries: LayerFeatures, output: Output = "label") -> Scores:
        """Score every training sample for one output of every query.

        Args:
            queries: Layer features of the queries.
            output: Which output; see :class:`RepresenterPoint`.
        """
        directions = _directions(queries, output)
        return Scores(
            values=self._inner_products(queries) * (directions @ self.values.mT),
            query_ids=queries.ids,
            train_ids=self.train_ids,
            method=self.method,
            provenance={"layer": self.layer, "output": str(output)},
        )

    def importance(self) -> SampleScores:
        r"""Return the norm of every sample's :math:`\alpha`: its weight in the layer."""
        return SampleScores(
            values=self.values.norm(dim=1),
            train_ids=self.train_ids,
            method=self.method,
            provenance={"layer": self.layer},
        )

    def _inner_products(self, queries: LayerFeatures) -> Float[Tensor, "n_query n_train"]:
        require_same_layer(queries, self.layer, self.features.shape[1])
        return queries.features.double() @ self.features.mT


def _directions(queries: LayerFeatures, output: Output) -> Float[Tensor, "n_query c"]:
    head = head_of("queries", queries)
    return output_directions(head, infer_loss(head, queries.layer), output)


def stationary_weight(
    loss: HeadLoss,
    features: Float[Tensor, "n d"],
    initial: Float[Tensor, "c d"],
    regularization: float,
) -> Float[Tensor, "c d"]:
    r"""Minimize the mean loss plus :math:`\lambda \lVert W \rVert^2`, from an initial weight.

    Raises:
        ValueError: If L-BFGS does not come close enough for the decomposition to hold.
    """
    weight = initial.clone()
    # With this gradient norm, the error of the outputs is at most `_MAX_OUTPUT_ERROR`.
    tolerance = 2 * regularization * _MAX_OUTPUT_ERROR / max(1.0, float(features.norm(dim=1).max()))
    optimizer = torch.optim.LBFGS(
        [weight],
        max_iter=10_000,
        max_eval=20_000,
        tolerance_grad=tolerance / weight.numel() ** 0.5,
        tolerance_change=0.0,
        history_size=30,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        outputs = features @ weight.mT
        loss_gradient = loss.gradients(outputs).mT @ features / len(features)
        weight.grad = loss_gradient + 2 * regularization * weight
        return loss.value(outputs) + regularization * weight.square().sum()

    with torch.no_grad():
        optimizer.step(closure)  # type: ignore[no-untyped-call]
        closure()
        # Rounding of the loss stops the line search early; a Newton step gets closer.
        weight -= _newton_step(loss, features, weight, regularization)
        closure()
    assert weight.grad is not None
    gradient_norm = float(weight.grad.norm())
    # A hundred times the tolerance is still exact enough.
    if not gradient_norm <= 100 * tolerance:
        raise ValueError(
            "The refit of the last layer did not converge with `regularization="
            f"{regularization:g}`: the norm of the gradient is {gradient_norm:.1e}; expected "
            f"{100 * tolerance:.1e} or less. Increase `regularization`."
        )
    weight.grad = None
    return weight


def _newton_step(
    loss: HeadLoss, features: Float[Tensor, "n d"], weight: Float[Tensor, "c d"], lam: float
) -> Float[Tensor, "c d"]:
    """Solve for the Newton step, which is to be subtracted, by conjugate gradients."""
    n, outputs = len(features), features @ weight.mT
    gradient = loss.gradients(outputs).mT @ features / n + 2 * lam * weight

    def product(columns: Float[Tensor, "cd 1"]) -> Float[Tensor, "cd 1"]:
        direction = columns.view_as(weight)
        output_products = loss.hessian_product(outputs, features @ direction.mT)
        return (output_products.mT @ features / n + 2 * lam * direction).reshape(-1, 1)

    solved = conjugate_gradient(product, gradient.reshape(-1, 1), 1e-8, weight.numel())
    return solved.view_as(weight)
