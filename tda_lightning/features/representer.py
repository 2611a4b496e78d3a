r"""Representer points: outputs as sums over training samples.

Where the last layer :math:`\Phi = \phi W^\top` is at a stationary point of its loss with L2
regularization, its weights are a weighted sum of the training features, and so is every output,

.. math:: \Phi(x_t) = \sum_i \alpha_i \, \langle \phi_i, \phi_t \rangle, \qquad
   \alpha_i = -\frac{1}{2 \lambda n} \frac{\partial L(x_i, y_i)}{\partial \Phi(x_i)}

Yeh et al. (2018), "Representer Point Selection for Explaining Deep Neural Networks", theorem 3.1. A
trained model's last layer is not at such a point, so it is first brought there, from the weights
given, with all else as it is (section 3.2; there by gradient descent with a line search, here by
L-BFGS with one). A bias is the weight of a feature that is always one.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tda_lightning.arguments import require_choice, require_positive
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
from tda_lightning.results.scores import SampleScores, Scores

Targets = Literal["labels", "predictions"]
# The decomposition shall give the outputs of the last layer to this.
_PRECISION = 1e-6


@dataclass(frozen=True)
class RepresenterPoint(LayerFeatureAttributor):
    r"""What each training sample adds to an output of the refitted last layer.

    A positive score marks a proponent: it raises that output. Scores of a query sum to the output.
    Memory: a few times the features and the outputs of all samples, and sixty times the weight.

    Attributes:
        output: Which output of a query: that of its label, of the model's prediction, or that with
            an index; ``"loss"`` weights all of them by how they lower the query's loss.
        targets: What the last layer is fitted to: the labels, or the model's own predictions, which
            keeps the refitted model close to the given one (the paper's choice for trained models).
        regularization: The factor :math:`\lambda` of the squared weights.
        layer: Name of the layer; by default the last ``Linear`` that is called.
    """

    output: Output = "label"
    targets: Targets = "labels"
    regularization: float = 3e-3
    layer: str | None = None
    reads: ClassVar[Literal["features", "head"]] = "head"

    def __post_init__(self) -> None:
        """Raise unless every argument is one that can be."""
        require_output(self.output)
        require_choice("targets", self.targets, Targets)
        require_positive("regularization", self.regularization)

    def attribute(self, train: LayerFeatures, queries: LayerFeatures) -> Scores:
        """Score every training sample for every query.

        Args:
            train: The training samples, as the layer saw them.
            queries: The queries, as the layer saw them.
        """
        _directions(queries, self.output)  # refused before the refit, not after it
        return self.fit(train).attribute(queries, self.output)

    def fit(self, train: LayerFeatures) -> Representers:
        """Refit the last layer and decompose it.

        Raises:
            ValueError: If the loss is neither a softmax cross-entropy nor a squared error, or the
                refit does not arrive.
        """
        head, features = head_of("train", train), train.features.double()
        loss = loss_of_head(head, train.layer)
        if self.targets == "predictions":
            loss = loss.towards(head.outputs)
        weight = stationary_weight(loss, features, head.weight, self.regularization)
        gradients = loss.gradients(features @ weight.mT)
        values = -gradients / (2 * self.regularization * len(features))
        return Representers(features, values, train.ids, train.layer, weight, repr(self))


@dataclass(frozen=True)
class Representers:
    r"""A last layer as a weighted sum of training samples.

    Attributes:
        features: Features of the training samples, shape ``(n_train, d)``.
        values: Representer values :math:`\alpha`, one per output, shape ``(n_train, c)``.
        train_ids: Ids of the training samples, shape ``(n_train,)``.
        layer: Name of the layer.
        weight: The refitted weight, with the bias as last column, shape ``(c, d)``.
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
        return self._alike(queries) @ self.values

    def contributions(self, queries: LayerFeatures) -> Float[Tensor, "n_query n_train c"]:
        """Return what every training sample adds to every output of every query."""
        return self._alike(queries)[:, :, None] * self.values

    def attribute(self, queries: LayerFeatures, output: Output = "label") -> Scores:
        """Score every training sample for one output of every query.

        Args:
            queries: The queries, as the layer saw them.
            output: Which output; see :class:`RepresenterPoint`.
        """
        directions = _directions(queries, output)
        return Scores(
            values=self._alike(queries) * (directions @ self.values.mT),
            query_ids=queries.ids,
            train_ids=self.train_ids,
            method=self.method,
            provenance={"layer": self.layer, "output": str(output)},
        )

    def importance(self) -> SampleScores:
        r"""Return the length of every sample's :math:`\alpha`: how much the layer leans on it."""
        return SampleScores(
            values=self.values.norm(dim=1),
            train_ids=self.train_ids,
            method=self.method,
            provenance={"layer": self.layer},
        )

    def _alike(self, queries: LayerFeatures) -> Float[Tensor, "n_query n_train"]:
        require_same_layer(queries, self.layer, self.features.shape[1])
        return queries.features.double() @ self.features.mT


def _directions(queries: LayerFeatures, output: Output) -> Float[Tensor, "n_query c"]:
    head = head_of("queries", queries)
    return output_directions(head, loss_of_head(head, queries.layer), output)


def stationary_weight(
    loss: HeadLoss,
    features: Float[Tensor, "n d"],
    weight: Float[Tensor, "c d"],
    regularization: float,
) -> Float[Tensor, "c d"]:
    r"""Minimize the mean loss plus :math:`\lambda \lVert W \rVert^2`, from the weights given.

    Raises:
        ValueError: If L-BFGS does not come close enough for the decomposition to hold.
    """
    found = weight.clone()
    # Of a weight with this gradient, the decomposition misses no output by more than the precision.
    tolerance = 2 * regularization * _PRECISION / max(1.0, float(features.norm(dim=1).max()))
    optimizer = torch.optim.LBFGS(
        [found],
        max_iter=10_000,
        max_eval=20_000,
        tolerance_grad=tolerance / found.numel() ** 0.5,
        tolerance_change=0.0,
        history_size=30,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        outputs = features @ found.mT
        pull = loss.gradients(outputs).mT @ features / len(features)
        found.grad = pull + 2 * regularization * found
        return loss.value(outputs) + regularization * found.square().sum()

    with torch.no_grad():
        optimizer.step(closure)  # type: ignore[no-untyped-call]
        closure()
        # The line search ends where rounding hides the slope of the loss; Newton's step does not.
        found -= _newton_step(loss, features, found, regularization)
        closure()
    assert found.grad is not None
    missed = float(found.grad.norm())
    # A hundred times the precision is still exact enough.
    if not missed <= 100 * tolerance:
        raise ValueError(
            "The last layer did not arrive at a stationary point with `regularization="
            f"{regularization:g}`: its gradient is {missed:.1e}; expected {100 * tolerance:.1e} or "
            "less. Take a larger `regularization`."
        )
    found.grad = None
    return found


def _newton_step(
    loss: HeadLoss, features: Float[Tensor, "n d"], weight: Float[Tensor, "c d"], lam: float
) -> Float[Tensor, "c d"]:
    """Solve for Newton's step, to be subtracted, by conjugate gradients."""
    n, outputs = len(features), features @ weight.mT
    residual = loss.gradients(outputs).mT @ features / n + 2 * lam * weight
    step, direction = torch.zeros_like(weight), residual.clone()
    square = first = residual.square().sum()
    for _ in range(weight.numel()):
        if square <= 1e-16 * first:
            break
        moved = loss.hessian_product(outputs, features @ direction.mT)
        product = moved.mT @ features / n + 2 * lam * direction
        length = square / (direction * product).sum()
        step += length * direction
        residual -= length * product
        before, square = square, residual.square().sum()
        direction = residual + square / before * direction
    return step
