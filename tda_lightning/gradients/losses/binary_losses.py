"""Binary cross-entropies on the autograd graph, of logits and of probabilities."""

from __future__ import annotations

import torch
from torch import Generator, Tensor
from torch.nn import functional

from tda_lightning.gradients.losses.loss_nodes import Predictions, ReducedLoss, Terms, uniform


class BernoulliLogitsLoss(ReducedLoss):
    """Binary cross-entropy of logits."""

    def _weight_arguments(self) -> Tensor:
        pos_weight = self.saved("pos_weight")
        weights = super()._weight_arguments()
        target = self.saved("target")
        return weights if pos_weight is None else weights * (1 + (pos_weight - 1) * target)

    def sample(self, generator: Generator) -> Tensor:
        """Sample binary labels."""
        p = self._probabilities()
        return p - _sampled_bits(p, generator)

    def summarize(self, grad: Tensor, weights: Tensor) -> Terms:
        """Return facts of each term; a label may lie between the classes."""
        return _binary_terms(self._probabilities(), self._weighted_residuals(grad) / weights)

    def predictions(self, value_grad: Tensor, grad: Tensor, weights: Tensor) -> Predictions:
        """Return the loss, the norm of the error of both classes, and the margin."""
        return _binary(self._exact_losses(), self.saved("self").detach(), self.saved("target"))

    def losses(self, value_grad: Tensor, weights: Tensor, square: Tensor) -> Tensor:
        """Return the value of each term, also for a label between the classes."""
        return self._exact_losses()

    def _exact_losses(self) -> Tensor:
        return functional.binary_cross_entropy_with_logits(
            self.saved("self").detach(), self.saved("target"), reduction="none"
        )

    def _probabilities(self) -> Tensor:
        p: Tensor = self.saved("self").detach().sigmoid()
        return p


class BernoulliLoss(ReducedLoss):
    """Binary cross-entropy of probabilities."""

    def sample(self, generator: Generator) -> Tensor:
        """Sample binary labels."""
        p = self._probabilities()
        return (p - _sampled_bits(p, generator)) / (p * (1 - p))

    def summarize(self, grad: Tensor, weights: Tensor) -> Terms:
        """Return facts of each term as of its logit; a label may lie between the classes."""
        return _binary_terms(self._probabilities(), self._weighted_residuals(grad) / weights)

    def predictions(self, value_grad: Tensor, grad: Tensor, weights: Tensor) -> Predictions:
        """Return the loss, the norm of the error of both classes, and the margin."""
        return _binary(self._exact_losses(), self._probabilities().logit(), self.saved("target"))

    def losses(self, value_grad: Tensor, weights: Tensor, square: Tensor) -> Tensor:
        """Return the value of each term, also for a label between the classes."""
        return self._exact_losses()

    def _exact_losses(self) -> Tensor:
        return functional.binary_cross_entropy(
            self._probabilities(), self.saved("target"), reduction="none"
        )

    def _weighted_residuals(self, grad: Tensor) -> Tensor:
        p = self._probabilities()
        return (grad * p * (1 - p)).abs()

    def _probabilities(self) -> Tensor:
        p: Tensor = self.saved("self").detach().clamp(1e-6, 1 - 1e-6)
        return p


def _binary_terms(p: Tensor, residuals: Tensor) -> Terms:
    return Terms.of_one_output((p * (1 - p)).expand_as(residuals), residuals.square())


def _binary(loss: Tensor, logits: Tensor, target: Tensor) -> Predictions:
    """Return the predictions of two classes; a label between them counts as the nearer class."""
    # Both classes have the same error, with opposite signs.
    error = 2**0.5 * (logits.sigmoid() - target).abs()
    return Predictions(loss, error, torch.where(target > 0.5, logits, -logits))


def _sampled_bits(p: Tensor, generator: Generator) -> Tensor:
    return (uniform(p, generator) < p).to(p)
