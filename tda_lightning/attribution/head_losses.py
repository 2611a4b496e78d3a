"""The loss behind a linear layer, as a function of the layer's outputs.

It need not be written down again: what each sample's own loss asks of the outputs tells what the
loss is, and what its labels are.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import one_hot

from tda_lightning.points import Head

Output = Literal["label", "prediction", "loss"] | int


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
    def hessians(self, outputs: Float[Tensor, "n c"]) -> Float[Tensor, "n c c"]:
        """Return the Hessian of each sample's loss."""

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

    def hessians(self, outputs: Float[Tensor, "n c"]) -> Float[Tensor, "n c c"]:
        """Return the covariances of labels drawn from the probabilities."""
        p = outputs.softmax(dim=1)
        return torch.diag_embed(p) - p[:, :, None] * p[:, None, :]

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

    def hessians(self, outputs: Float[Tensor, "n c"]) -> Float[Tensor, "n c c"]:
        """Return the factor times the identity."""
        n, c = outputs.shape
        return self.factor * torch.eye(c, dtype=outputs.dtype).expand(n, c, c)

    def towards(self, outputs: Float[Tensor, "n c"]) -> HeadLoss:
        """Take these outputs for targets."""
        return SquaredLoss(outputs, self.factor)

    def labels(self) -> Int[Tensor, " n"]:
        """Return the only output."""
        return _only_output(self.targets)


def loss_of_head(head: Head, layer: str) -> HeadLoss:
    """Tell the loss behind a layer, and its targets, from its gradients.

    Args:
        head: The layer, as it acted; in float64.
        layer: Its name, for messages.

    Raises:
        ValueError: If the loss is neither a softmax cross-entropy nor a squared error.
    """
    # Gradients come in the number format of the model, and so do their errors.
    if head.slopes.abs().max() < 1e-3:
        targets = head.outputs.softmax(dim=1) - head.gradients
        if targets.min() > -1e-3 and (targets.sum(dim=1) - 1).abs().max() < 1e-3:
            clean = targets.clamp_min(0)
            return SoftmaxLoss(clean / clean.sum(dim=1, keepdim=True))
    factor = head.slopes.mean()
    if factor > 0 and (head.slopes - factor).abs().max() <= 1e-3 * factor:
        return SquaredLoss(head.outputs - head.gradients / factor, float(factor))
    raise ValueError(
        f"The loss behind `{layer}` is none that representer points are known for: expected the "
        "mean over the batch of a softmax cross-entropy, or of a squared error, of what this layer "
        "returns. Name the layer that gives the logits with `layer=`, or use `FeatureSimilarity()`."
    )


def output_directions(head: Head, loss: HeadLoss, output: Output) -> Float[Tensor, "n c"]:
    """Return what is asked of the outputs of each query, as a direction to raise.

    Args:
        head: The layer, as it acted on the queries.
        loss: The loss of the queries.
        output: The output to raise, or ``"loss"`` for the way down the query's own loss.

    Raises:
        ValueError: If there is no such output.
    """
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
    if not 0 <= output < c:
        raise ValueError(
            f"`output={output}` names none of the {c} outputs; expected an index from 0 to {c - 1}."
        )
    return output
