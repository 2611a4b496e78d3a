"""The loss behind a linear layer, as a function of the layer's outputs.

It need not be written down again: what each sample's own loss asks of two outputs tells what the
loss is, and what its labels are. Between the two, the gradient of a softmax cross-entropy moves as
the probabilities do, and that of a squared error as the outputs do, whatever the labels.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import one_hot

from tda_lightning.arguments import require_whole
from tda_lightning.features.layer_features import HeadOutputs

OutputWord = Literal["label", "prediction", "loss"]
Output = OutputWord | int


@dataclass(frozen=True)
class HeadLoss(ABC):
    """A loss per sample.

    Attributes:
        targets: What every output should be, shape ``(n, c)``.
    """

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
        """Return the Hessian of each sample's loss, times a direction; no Hessian is formed."""

    @abstractmethod
    def towards(self, outputs: Float[Tensor, "n c"]) -> HeadLoss:
        """Return the same loss, of a model that gives these outputs already."""

    @abstractmethod
    def labels(self) -> Int[Tensor, " n"]:
        """Return the output that is each sample's label.

        Raises:
            ValueError: If outputs are no labels.
        """


@dataclass(frozen=True)
class SoftmaxLoss(HeadLoss):
    """Softmax cross-entropy; targets are probabilities."""

    def value(self, outputs: Float[Tensor, "n c"]) -> Float[Tensor, ""]:
        """Return the mean loss."""
        return -(self.targets * outputs.log_softmax(dim=1)).sum(dim=1).mean()

    def gradients(self, outputs: Float[Tensor, "n c"]) -> Float[Tensor, "n c"]:
        """Return probabilities less targets."""
        return outputs.softmax(dim=1) - self.targets

    def hessian_product(
        self, outputs: Float[Tensor, "n c"], directions: Float[Tensor, "n c"]
    ) -> Float[Tensor, "n c"]:
        """Return the covariance of labels drawn from the probabilities, times a direction."""
        p = outputs.softmax(dim=1)
        return p * directions - p * (p * directions).sum(dim=1, keepdim=True)

    def towards(self, outputs: Float[Tensor, "n c"]) -> HeadLoss:
        """Take the probabilities of these outputs for targets."""
        return SoftmaxLoss(outputs.softmax(dim=1))

    def labels(self) -> Int[Tensor, " n"]:
        """Return the most probable target."""
        return self.targets.argmax(dim=1)


@dataclass(frozen=True)
class SquaredLoss(HeadLoss):
    """Half the squared distance to the targets, times a factor.

    Attributes:
        targets: What every output should be, shape ``(n, c)``.
        factor: Second derivative of a sample's loss with respect to an output.
    """

    factor: float

    def value(self, outputs: Float[Tensor, "n c"]) -> Float[Tensor, ""]:
        """Return the mean loss."""
        return self.factor / 2 * (outputs - self.targets).square().sum(dim=1).mean()

    def gradients(self, outputs: Float[Tensor, "n c"]) -> Float[Tensor, "n c"]:
        """Return the misses, times the factor."""
        return self.factor * (outputs - self.targets)

    def hessian_product(
        self, outputs: Float[Tensor, "n c"], directions: Float[Tensor, "n c"]
    ) -> Float[Tensor, "n c"]:
        """Return the factor times the direction."""
        return self.factor * directions

    def towards(self, outputs: Float[Tensor, "n c"]) -> HeadLoss:
        """Take these outputs for targets."""
        return SquaredLoss(outputs, self.factor)

    def labels(self) -> Int[Tensor, " n"]:
        """Return the only output."""
        return _only_output(self.targets)


def loss_of_head(head: HeadOutputs, layer: str) -> HeadLoss:
    """Tell the loss behind a layer, and its targets, from its gradients.

    Targets of a softmax cross-entropy may be any probabilities, of smoothed or mixed labels say. It
    has to be the plain mean over samples; a squared error may have any factor, the same for all.

    Args:
        head: The layer, as it acted; in float64.
        layer: Its name, for messages.

    Raises:
        ValueError: If the loss is neither a softmax cross-entropy nor a squared error.
    """
    # Gradients come in the number format of the model, and so do their errors.
    tolerance = min(max(1e3 * head.rounding, 1e-5), 0.05)
    found = _as_softmax(head, tolerance) or _as_squared(head, tolerance)
    if found is None:
        raise ValueError(
            f"The loss behind `{layer}` is none that representer points are known for"
            f"{_weights_said(head, tolerance)}: expected the mean over the batch of a softmax "
            "cross-entropy, or of a squared error, of what this layer returns, without weights. "
            "Name the layer that gives the logits with `layer=`, have `training_step` return the "
            "plain loss when you ask, or use `FeatureSimilarity()`."
        )
    return found


def _as_softmax(head: HeadOutputs, tolerance: float) -> SoftmaxLoss | None:
    probabilities, probed = head.outputs.softmax(dim=1), head.probes.softmax(dim=1)
    moved = head.gradients - head.probe_gradients
    targets = probabilities - head.gradients
    misses = (
        (moved - (probabilities - probed)).abs().max(),
        (targets.sum(dim=1) - 1).abs().max(),
        -targets.min(),
    )
    if not all(miss <= tolerance for miss in misses):
        return None
    positive = targets.clamp_min(0)
    return SoftmaxLoss(positive / positive.sum(dim=1, keepdim=True))


def _as_squared(head: HeadOutputs, tolerance: float) -> SquaredLoss | None:
    apart, moved = head.outputs - head.probes, head.gradients - head.probe_gradients
    factor = float((moved * apart).sum() / apart.square().sum())
    # What a gradient is rounded to depends on the outputs and targets that it is a difference of.
    scale = head.gradients.abs() + head.probe_gradients.abs()
    scale += abs(factor) * (head.outputs.abs() + head.probes.abs())
    if not (factor > 0 and ((moved - factor * apart).abs() <= tolerance * scale).all()):
        return None
    return SquaredLoss(head.outputs - head.gradients / factor, factor)


def _weights_said(head: HeadOutputs, tolerance: float) -> str:
    """Say what the samples of a softmax cross-entropy would weigh, if it could be one."""
    expected = head.outputs.softmax(dim=1) - head.probes.softmax(dim=1)
    moved = head.gradients - head.probe_gradients
    weights = (moved * expected).sum(dim=1) / expected.square().sum(dim=1)
    misses = (moved - weights[:, None] * expected).abs().amax(dim=1)
    if not (misses <= tolerance * weights.abs().clamp_min(1)).all():
        return ""
    least, most = float(weights.min()), float(weights.max())
    return f" (as if samples of a softmax cross-entropy weighed {least:.3g} to {most:.3g}, not 1)"


def require_output(output: Output) -> None:
    """Raise unless this can be an output to ask about.

    Raises:
        ValueError: If it is neither a word that names one nor an index.
    """
    if not isinstance(output, str):
        require_whole("output", output, least=0)
    elif output not in get_args(OutputWord):
        raise ValueError(
            f"`output` is {output!r}; expected 'label', 'prediction', 'loss', or the index of an "
            "output."
        )


def output_directions(head: HeadOutputs, loss: HeadLoss, output: Output) -> Float[Tensor, "n c"]:
    """Return what is asked of the outputs of each query, as a direction to raise.

    Args:
        head: The layer, as it acted on the queries.
        loss: The loss of the queries.
        output: The output to raise, or ``"loss"`` for the way down the query's own loss.

    Raises:
        ValueError: If there is no such output.
    """
    require_output(output)
    c = head.outputs.shape[1]
    if output == "loss":
        return -head.gradients
    if output == "label":
        chosen = loss.labels()
    elif output == "prediction":
        is_softmax = isinstance(loss, SoftmaxLoss)
        chosen = head.outputs.argmax(dim=1) if is_softmax else _only_output(head.outputs)
    else:
        chosen = torch.full((len(head.outputs),), _checked(output, c))
    return one_hot(chosen, c).to(head.outputs)


def _only_output(outputs: Float[Tensor, "n c"]) -> Int[Tensor, " n"]:
    if outputs.shape[1] > 1:
        raise ValueError(
            f"A squared error of {outputs.shape[1]} outputs has no label to ask about; expected "
            "`output=` to be the index of one of them, or 'loss'."
        )
    return torch.zeros(len(outputs), dtype=torch.int64)


def _checked(output: int, c: int) -> int:
    if output >= c:
        raise ValueError(
            f"`output={output}` names none of the {c} outputs; expected an index from 0 to {c - 1}."
        )
    return output
