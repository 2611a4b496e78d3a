"""LossSummary: facts of each sample's loss, gathered in the backward pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tda_lightning.gradients.losses.loss_nodes import LossNode, Predictions


@dataclass(frozen=True)
class LossFacts:
    """Facts of each sample's loss in a batch, each of them ``None`` if unknown.

    Attributes:
        name: Name of the loss, empty if it is not supported.
        terms: Number of loss terms that each sample's loss is the mean of.
        spread: Second derivative of each sample's loss with respect to the outputs of its labels,
            divided by its squared gradient there. Both are weighted as in the loss of the batch.
        full_spread: Trace of each sample's Hessian with respect to all outputs, likewise.
        losses: Mean of each sample's terms. It is NaN if none of them has a weight.
        errors: Norm of the difference between predicted probabilities and label.
        margins: Logit of the label minus the highest other logit.
    """

    name: str = ""
    terms: Float[Tensor, " n"] | None = None
    spread: Float[Tensor, " n"] | None = None
    full_spread: Float[Tensor, " n"] | None = None
    losses: Float[Tensor, " n"] | None = None
    errors: Float[Tensor, " n"] | None = None
    margins: Float[Tensor, " n"] | None = None

    def of_visits(self, weight: float) -> dict[str, Float[Tensor, " n"] | None]:
        """Return the facts of visits by the names that :class:`Step` has for them.

        Args:
            weight: Weight of each sample's loss in the loss of the batch.
        """
        curvature, trace_ratio = (
            None if spread is None or self.terms is None else weight * spread / self.terms
            for spread in (self.spread, self.full_spread)
        )
        return {
            "terms": self.terms,
            "curvature": curvature,
            "trace_ratio": trace_ratio,
            "losses": self.losses,
            "errors": self.errors,
            "margins": self.margins,
        }


class LossSummary:
    """Hook the loss functions of a batch to summarize each sample's loss in the backward pass.

    Args:
        nodes: The loss functions of a batch, before its backward pass.
        n: Number of samples in the batch.
        is_paused: Returns whether the current backward pass is not the batch's.
    """

    def __init__(
        self, nodes: Sequence[LossNode], n: int, is_paused: Callable[[], bool] = lambda: False
    ) -> None:
        self._is_paused = is_paused
        self._n = n
        self._names = sorted({node.name for node in nodes})
        # Sums over terms of a sample: weights, their squares, losses, traces, squared gradients.
        self._sums: list[Tensor] = []
        self._predictions: list[Predictions | None] = []
        for node in nodes:
            node.node.register_hook(self._hook(node))

    def _hook(self, node: LossNode) -> Callable[[Any, Any], None]:
        waiting = [node]

        def hook(inputs: tuple[Tensor | None, ...], outputs: tuple[Tensor | None, ...]) -> None:
            if (
                waiting
                and not self._is_paused()
                and inputs[0] is not None
                and outputs[0] is not None
            ):
                with torch.no_grad():
                    self._add(waiting.pop(), outputs[0], inputs[0])

        return hook

    def _add(self, node: LossNode, value_grad: Tensor, outputs_grad: Tensor) -> None:
        weights = node.weights(value_grad)
        if weights.numel() % self._n:
            return
        divisors = torch.where(weights == 0, 1, weights)
        terms = node.summarize(outputs_grad, divisors)
        # Only then is a label one of few classes: a look at all of a vocabulary takes time.
        is_one_term = weights.numel() == self._n
        predictions = node.predictions(value_grad, outputs_grad, divisors) if is_one_term else None
        self._predictions.append(predictions)
        if predictions is None:
            loss = node.losses(value_grad, divisors, terms.square)
        else:
            loss = predictions.loss
        loss = torch.where(terms.square.isnan(), torch.nan, loss)
        squares = weights.square()
        parts = [weights, squares, weights * loss, weights * terms.trace, squares * terms.square]
        parts += [weights * terms.full_trace, squares * terms.full_square]
        # A sample's terms are contiguous, even if the sample axis has been flattened.
        sums = [p.reshape(self._n) if is_one_term else _sums(p, self._n) for p in parts]
        self._sums = [a + b for a, b in zip(self._sums, sums, strict=True)] if self._sums else sums

    def facts(self) -> LossFacts:
        """Return the facts of each sample's loss, after the backward pass."""
        name = " and ".join(self._names)
        if not self._sums:
            return LossFacts(name)
        total, squares, loss, trace, square, full_trace, full_square = self._sums
        is_counted = total != 0
        # Labels that two loss functions share have two predictions.
        predictions = self._predictions[0] if len(self._predictions) == 1 else None
        errors, margins = (
            None if values is None else torch.where(is_counted, values.reshape(self._n), torch.nan)
            for values in (predictions[1:] if predictions else (None, None))
        )
        return LossFacts(
            name,
            terms=torch.where(squares > 0, total.square() / squares, 1),
            spread=torch.where(square == 0, 0, trace / square),
            full_spread=torch.where(full_square == 0, 0, full_trace / full_square),
            losses=torch.where(is_counted, loss / total, torch.nan),
            errors=errors,
            margins=margins,
        )


def _sums(terms: Tensor, n: int) -> Float[Tensor, " n"]:
    return terms.reshape(n, -1).sum(dim=1)
