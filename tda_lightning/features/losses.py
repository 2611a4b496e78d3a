"""Infer the loss of one linear layer's outputs, and choose the output of each query to explain.

Users need not specify the loss. The gradients of each sample's loss at two outputs determine the
loss and its targets. From one output to the other, the gradient of a softmax cross-entropy changes
as the probabilities do. The gradient of a squared error changes as the outputs do. Both hold for
all targets. No recorded run is needed.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import one_hot

from tda_lightning.features.layer_features import HeadOutputs
from tda_lightning.stores.arguments import require_whole

OutputWord = Literal["label", "prediction", "loss"]
Output = OutputWord | int


@dataclass(frozen=True)
class HeadLoss(ABC):
    """The loss of each sample, as a function of a layer's outputs, with a target per output."""

    targets: Float[Tensor, "n c"]

    @abstractmethod
    def value(self, outputs: Float[Tensor, "n c"]) -> Float[Tensor, ""]:
        """Return the mean loss."""

    @abstractmethod
    def gradients(self, outputs: Float[Tensor, "n c"]) -> Float[Tensor, "n c"]:
        """Return the gradient of each sample's loss."""

    @abstractmethod
    def hessian_product(
        self, outputs: Float[Tensor, "n c"], directions: Float[Tensor, "n c"]
    ) -> Float[Tensor, "n c"]:
        """Multiply the Hessian of each sample's loss by a direction; no Hessian is formed."""

    @abstractmethod
    def with_targets_from(self, outputs: Float[Tensor, "n c"]) -> HeadLoss:
        """Return the same loss, with targets at which these outputs are optimal."""

    @abstractmethod
    def labels(self) -> Int[Tensor, " n"]:
        """Return the index of the output that is each sample's label.

        Raises:
            ValueError: If the loss has no labels.
        """


@dataclass(frozen=True)
class SoftmaxLoss(HeadLoss):
    """Softmax cross-entropy; targets are probabilities."""

    def value(self, outputs: Float[Tensor, "n c"]) -> Float[Tensor, ""]:
        """Return the mean loss."""
        return -(self.targets * outputs.log_softmax(dim=1)).sum(dim=1).mean()

    def gradients(self, outputs: Float[Tensor, "n c"]) -> Float[Tensor, "n c"]:
        """Return the probabilities minus the targets."""
        return outputs.softmax(dim=1) - self.targets

    def hessian_product(
        self, outputs: Float[Tensor, "n c"], directions: Float[Tensor, "n c"]
    ) -> Float[Tensor, "n c"]:
        """Multiply the covariance of labels drawn from the probabilities by a direction."""
        p = outputs.softmax(dim=1)
        return p * directions - p * (p * directions).sum(dim=1, keepdim=True)

    def with_targets_from(self, outputs: Float[Tensor, "n c"]) -> HeadLoss:
        """Use the probabilities of these outputs as targets."""
        return SoftmaxLoss(outputs.softmax(dim=1))

    def labels(self) -> Int[Tensor, " n"]:
        """Return the most probable target."""
        return self.targets.argmax(dim=1)


@dataclass(frozen=True)
class SquaredLoss(HeadLoss):
    """Half the squared distance to the targets, times a factor."""

    factor: float

    def value(self, outputs: Float[Tensor, "n c"]) -> Float[Tensor, ""]:
        """Return the mean loss."""
        return self.factor / 2 * (outputs - self.targets).square().sum(dim=1).mean()

    def gradients(self, outputs: Float[Tensor, "n c"]) -> Float[Tensor, "n c"]:
        """Return the residuals times the factor."""
        return self.factor * (outputs - self.targets)

    def hessian_product(
        self, outputs: Float[Tensor, "n c"], directions: Float[Tensor, "n c"]
    ) -> Float[Tensor, "n c"]:
        """Return the factor times the direction."""
        return self.factor * directions

    def with_targets_from(self, outputs: Float[Tensor, "n c"]) -> HeadLoss:
        """Use these outputs as targets."""
        return SquaredLoss(outputs, self.factor)

    def labels(self) -> Int[Tensor, " n"]:
        """Return the index of the only output."""
        return _only_output(self.targets)


def infer_loss(head: HeadOutputs, layer: str) -> HeadLoss:
    """Infer the loss of a layer's outputs, and its targets, from its gradients.

    Targets of a softmax cross-entropy may be any probabilities, such as smoothed or mixed labels.
    The loss must be the plain mean over samples. A squared error may have any factor that all
    samples share.

    Raises:
        ValueError: If the loss is neither a softmax cross-entropy nor a squared error.
    """
    # The gradients have rounding errors of the model's number format.
    tolerance = min(max(1e3 * head.rounding, 1e-5), 0.05)
    loss = _as_softmax(head, tolerance) or _as_squared(head, tolerance)
    if loss is None:
        raise ValueError(
            f"Representer points do not support the loss of the outputs of `{layer}`"
            f"{_describe_weights(head, tolerance)}. Expected the unweighted mean over the batch of "
            "a softmax cross-entropy or a squared error of this layer's outputs. Name the layer "
            "that returns the logits with `layer=`, let `training_step` return the plain loss "
            "during attribution, or use `FeatureSimilarity()`."
        )
    return loss


def _as_softmax(head: HeadOutputs, tolerance: float) -> SoftmaxLoss | None:
    probabilities, probed = head.outputs.softmax(dim=1), head.probes.softmax(dim=1)
    gradient_change = head.gradients - head.probe_gradients
    targets = probabilities - head.gradients
    errors = (
        (gradient_change - (probabilities - probed)).abs().max(),
        (targets.sum(dim=1) - 1).abs().max(),
        -targets.min(),
    )
    if not all(error <= tolerance for error in errors):
        return None
    positive = targets.clamp_min(0)
    return SoftmaxLoss(positive / positive.sum(dim=1, keepdim=True))


def _as_squared(head: HeadOutputs, tolerance: float) -> SquaredLoss | None:
    output_change = head.outputs - head.probes
    gradient_change = head.gradients - head.probe_gradients
    factor = float((gradient_change * output_change).sum() / output_change.square().sum())
    # A gradient is a difference of outputs and targets: their size determines its rounding error.
    scale = head.gradients.abs() + head.probe_gradients.abs()
    scale += abs(factor) * (head.outputs.abs() + head.probes.abs())
    errors = (gradient_change - factor * output_change).abs()
    if not (factor > 0 and (errors <= tolerance * scale).all()):
        return None
    return SquaredLoss(head.outputs - head.gradients / factor, factor)


def _describe_weights(head: HeadOutputs, tolerance: float) -> str:
    """Describe the sample weights, if the loss could be a weighted softmax cross-entropy."""
    expected = head.outputs.softmax(dim=1) - head.probes.softmax(dim=1)
    gradient_change = head.gradients - head.probe_gradients
    weights = (gradient_change * expected).sum(dim=1) / expected.square().sum(dim=1)
    errors = (gradient_change - weights[:, None] * expected).abs().amax(dim=1)
    if not (errors <= tolerance * weights.abs().clamp_min(1)).all():
        return ""
    least, most = float(weights.min()), float(weights.max())
    return (
        f": it looks like a softmax cross-entropy with weights of {least:.3g} to {most:.3g}, not 1"
    )


def require_output(output: Output) -> None:
    """Check the choice of an output: one of the words, or an index."""
    if not isinstance(output, str):
        require_whole("output", output, least=0)
    elif output not in get_args(OutputWord):
        raise ValueError(
            f"`output` is {output!r}; expected 'label', 'prediction', 'loss', or the index of an "
            "output."
        )


def output_directions(head: HeadOutputs, loss: HeadLoss, output: Output) -> Float[Tensor, "n c"]:
    """Return the direction in the outputs that each query raises, if there is such an output."""
    require_output(output)
    c = head.outputs.shape[1]
    if output == "loss":
        return -head.gradients
    if output == "label":
        indices = loss.labels()
    elif output == "prediction":
        is_softmax = isinstance(loss, SoftmaxLoss)
        indices = head.outputs.argmax(dim=1) if is_softmax else _only_output(head.outputs)
    else:
        if output >= c:
            raise ValueError(
                f"`output` is {output}, but there are {c} outputs; expected an index from 0 to "
                f"{c - 1}."
            )
        indices = torch.full((len(head.outputs),), output)
    return one_hot(indices, c).to(head.outputs)


def _only_output(outputs: Float[Tensor, "n c"]) -> Int[Tensor, " n"]:
    if outputs.shape[1] > 1:
        raise ValueError(
            f"A squared error of {outputs.shape[1]} outputs has no label; expected `output=` to be "
            "the index of one of them, or 'loss'."
        )
    return torch.zeros(len(outputs), dtype=torch.int64)
