"""LossSummary: what a backward pass shows of the loss of every sample."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tda_lightning.gradients.losses.loss_nodes import LossNode


class LossSummary:
    """Per sample, from the backward pass: number of loss terms, and how curved they are.

    Args:
        nodes: The loss functions of a batch of ``n`` samples, whose backward pass is to come.
        n: Number of samples.
    """

    def __init__(self, nodes: Sequence[LossNode], n: int) -> None:
        self._n = n
        self._names = sorted({node.name for node in nodes})
        # Sums over a sample's terms: weights, their squares, traces, squared gradients.
        self._sums: list[Tensor] = []
        for node in nodes:
            node.node.register_hook(self._hook(node))

    def _hook(self, node: LossNode) -> Callable[[Any, Any], None]:
        waiting = [node]

        def hook(inputs: tuple[Tensor | None, ...], outputs: tuple[Tensor | None, ...]) -> None:
            if waiting and inputs[0] is not None and outputs[0] is not None:
                with torch.no_grad():
                    self._add(waiting.pop(), outputs[0], inputs[0])

        return hook

    def _add(self, node: LossNode, value_grad: Tensor, outputs_grad: Tensor) -> None:
        weights = node.weights(value_grad)
        if weights.numel() % self._n:
            return
        trace, square = node.summarize(outputs_grad, torch.where(weights == 0, 1, weights))
        squares = weights.square()
        parts = [weights, squares, weights * trace, squares * square]
        # Terms of one sample lie together, whether or not samples still have an axis of their own.
        sums = [part.reshape(self._n, -1).sum(dim=1) for part in parts]
        self._sums = [a + b for a, b in zip(self._sums, sums, strict=True)] if self._sums else sums

    def loss(self) -> str:
        """Return what the loss is called, or nothing if it is none that is known."""
        return " and ".join(self._names)

    def terms(self) -> Float[Tensor, " n"] | None:
        """Return how many terms of one weight would weigh as each sample's do, if known."""
        if not self._sums:
            return None
        total, squares, _, _ = self._sums
        return torch.where(squares > 0, total.square() / squares, 1)

    def spread(self) -> Float[Tensor, " n"] | None:
        """Return the trace of each sample's Hessian over its squared gradient, if known."""
        if not self._sums:
            return None
        _, _, trace, square = self._sums
        return torch.where(square > 0, trace / square, 0)
