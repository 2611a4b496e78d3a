"""Recognise losses of mixed samples, as in mixup and CutMix, by their labels."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tda_lightning.gradients.losses.graph import nodes_near

_NEGATIVE_LOG_LIKELIHOODS = {"NllLossBackward0", "NllLoss2DBackward0"}
_TOLERANCE = 1e-4


def mixes_samples(loss: Tensor) -> bool:
    r"""Return whether a loss has the labels of two samples for each output.

    Two forms are recognised. The first is
    :math:`\lambda \ell(f(x), y) + (1 - \lambda) \ell(f(x), y_\pi)` with a permutation :math:`\pi`.
    In the second, labels are distributions with the weights :math:`\lambda` and
    :math:`1 - \lambda`.

    Zhang et al. (2018), "mixup: Beyond Empirical Risk Minimization", section 2; Yun et al. (2019),
    "CutMix", eq. 2.

    Args:
        loss: The loss of a batch, with its graph.
    """
    nodes = nodes_near(loss)
    labels = defaultdict(list)
    for node in nodes:
        if node.name() in _NEGATIVE_LOG_LIKELIHOODS:
            labels[_outputs_of(node)].append(node._saved_target)
    if any(_are_permuted(each) for each in labels.values()):
        return True
    return any(_are_mixed(each) for node in nodes for each in _distributions(node))


def _outputs_of(node: Any) -> Any:
    """Return the node of the outputs behind a log-softmax."""
    log_softmax = node.next_functions[0][0]
    is_softmax = log_softmax is not None and log_softmax.name() == "LogSoftmaxBackward0"
    return log_softmax.next_functions[0] if is_softmax else log_softmax


def _are_permuted(labels: Sequence[Tensor]) -> bool:
    first, *others = (each.flatten() for each in labels)
    return any(
        other.shape == first.shape
        and not torch.equal(other, first)
        and torch.equal(other.sort().values, first.sort().values)
        for other in others
    )


def _distributions(node: Any) -> list[Tensor]:
    """Return the labels of a cross-entropy with distributions: the factor of its log-softmax."""
    children = [child.name() for child, _ in node.next_functions if child is not None]
    if node.name() != "MulBackward0" or children != ["LogSoftmaxBackward0"]:
        return []
    factors = (node._saved_self, node._saved_other)
    return [each for each in factors if isinstance(each, Tensor) and each.ndim == 2]


def _are_mixed(labels: Tensor) -> bool:
    """Return whether the rows are two-point distributions, with the same two weights in all."""
    sums, largest = labels.sum(dim=1), labels.amax(dim=1)
    in_two = (labels > 0).sum(dim=1) == 2
    if not in_two.any() or (labels < 0).any() or not _are_close(sums, torch.ones_like(sums)):
        return False
    if ((labels > 0).sum(dim=1) > 2).any():
        return False
    weights = largest[in_two]
    return _are_close(weights, weights[:1].expand_as(weights))


def _are_close(a: Tensor, b: Tensor) -> bool:
    return bool(((a - b).abs() <= _TOLERANCE).all())
