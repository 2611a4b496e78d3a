"""Infer from a loss's graph whether it is the mean or the sum of its samples' losses."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from tda_lightning.gradients.losses.graph import find_losses_and_penalties, term_weights
from tda_lightning.gradients.losses.loss_nodes import LossNode, SquarePower

Reduction = Literal["mean", "sum"]
_TOLERANCE = 1e-3


def reduction_of(loss: Tensor, n: int, share: float = 1.0) -> Reduction | None:
    """Return how a batch's loss combines its samples, or ``None`` if its graph leaves that open.

    Each term of a plain sum has the weight 1. The weights of a plain mean's terms sum to 1. If each
    sample's loss is itself a sum of terms, they are ``1 / n``. Losses with a factor,
    with class weights, or of a batch of one sample are left open.

    Args:
        loss: The loss of a batch, with its graph. A pass from it to its loss functions is made.
        n: Number of samples in the batch.
        share: Factor of the loss in the step's loss.
    """
    if n < 2 or not loss.requires_grad:
        return None
    nodes = [node for node in find_losses_and_penalties(loss) if _is_of_samples(node, n)]
    weights = [each for each in (term_weights(loss, nodes) if nodes else []) if each is not None]
    kinds = {_kind(each / share, n) for each in weights}
    return kinds.pop() if len(kinds) == 1 else None


def _is_of_samples(node: LossNode, n: int) -> bool:
    """Return whether a function is one of samples; squares may also be penalties on parameters."""
    if not isinstance(node, SquarePower):
        return True
    shape: tuple[int, ...] = tuple(node.node._saved_self.shape)
    return len(shape) > 0 and shape[0] == n


def _kind(weights: Tensor, n: int) -> Reduction | None:
    counted = weights[weights != 0].double()
    if not len(counted) or float(counted.max() - counted.min()) > _TOLERANCE * float(counted.max()):
        return None
    weight, total = float(counted.mean()), float(counted.sum())
    if abs(weight - 1) < _TOLERANCE:
        return "sum"
    is_mean = abs(total - 1) < _TOLERANCE or abs(n * weight - 1) < _TOLERANCE
    return "mean" if is_mean else None
