"""How a batch's loss combines its samples: by mean, by sum, or mixed, as in mixup and CutMix."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from tda_lightning.gradients.graph.walk import output_shape
from tda_lightning.gradients.losses.loss_graph import (
    find_losses_and_penalties,
    nodes_near,
    term_weights,
)
from tda_lightning.gradients.losses.loss_nodes import LossNode
from tda_lightning.gradients.losses.regression_losses import SquarePower
from tda_lightning.gradients.nodes.saved_values import saved_value
from tda_lightning.stores.precision import in_double_precision

Reduction = Literal["mean", "sum"]
_TOLERANCE = 1e-3


def reduction_of(
    loss: Tensor, n: int, share: float = 1.0, *, quotients: int = 0
) -> Reduction | None:
    """Return how a batch's loss combines its samples, or ``None`` if its graph leaves that open.

    Each term of a plain sum has the weight 1. The weights of a plain mean's terms sum to 1. If each
    sample's loss is itself a sum of terms, they are ``1 / n``. Losses with a factor,
    with class weights, or of a batch of one sample are left open. So are quotients with weights of
    1, since a sum may be divided by the number of positives, of which this batch has one.

    Args:
        loss: The loss of a batch, with its graph. A pass from it to its loss functions is made.
        n: Number of samples in the batch.
        share: Factor of the loss in the step's loss.
        quotients: Number of divisions of the loss that are not the user's.
    """
    if n < 2 or not loss.requires_grad:
        return None
    nodes = [node for node in find_losses_and_penalties(loss) if _is_of_samples(node, n)]
    weights = [each for each in (term_weights(loss, nodes) if nodes else []) if each is not None]
    kinds = {_kind(each / share, n) for each in weights}
    kind = kinds.pop() if len(kinds) == 1 else None
    return None if kind == "sum" and _count_quotients(loss) > quotients else kind


def _count_quotients(loss: Tensor) -> int:
    """Return the number of divisions between single numbers, above the functions of samples."""
    scalars: list[Any] = [loss.grad_fn]
    for node in scalars:
        children = [child for child, _ in node.next_functions if child not in scalars]
        scalars += [c for c in children if c is not None and output_shape((c, 0)) == ()]
    return sum(node.name() == "DivBackward0" for node in scalars)


def _is_of_samples(node: LossNode, n: int) -> bool:
    """Return whether a function is one of samples; squares may also be penalties on parameters."""
    if not isinstance(node, SquarePower):
        return True
    shape: tuple[int, ...] = tuple(node.saved("self").shape)
    return len(shape) > 0 and shape[0] == n


def _kind(weights: Tensor, n: int) -> Reduction | None:
    counted = in_double_precision(weights[weights != 0])
    if not len(counted) or float(counted.max() - counted.min()) > _TOLERANCE * float(counted.max()):
        return None
    weight, total = float(counted.mean()), float(counted.sum())
    if abs(weight - 1) < _TOLERANCE:
        return "sum"
    is_mean = abs(total - 1) < _TOLERANCE or abs(n * weight - 1) < _TOLERANCE
    return "mean" if is_mean else None


_RESIDUALS_OF = {"PowBackward0", "AbsBackward0"}
_NEGATIVE_LOG_LIKELIHOODS = {"NllLossBackward0", "NllLoss2DBackward0"}
_MAX_DIFFERENCE = 1e-4


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
            labels[_outputs_of(node)].append(saved_value(node, "target"))
    if any(_are_permuted(each) for each in labels.values()):
        return True
    return any(_are_mixed(each) for node in nodes for each in _distributions(node))


def compares_all_pairs(loss: Tensor, n: int) -> bool:
    """Return whether each output meets the targets of all samples: ``(n, 1)`` minus ``(n,)``.

    Args:
        loss: The loss of a batch, with its graph.
        n: Number of samples in the batch.
    """
    return any(
        node.name() in _RESIDUALS_OF and _is_of_all_pairs(node.next_functions[0][0], n)
        for node in nodes_near(loss)
    )


def _is_of_all_pairs(node: Any, n: int) -> bool:
    if node is None or node.name() not in ("SubBackward0", "RsubBackward1"):
        return False
    edges = [edge for edge in node.next_functions if edge[0] is not None]
    if len(edges) != 1 or not edges[0][0]._input_metadata:  # Both sides are outputs of the model.
        return False
    shape = tuple(node._input_metadata[0].shape)
    return n > 1 and shape == (n, n) and output_shape(edges[0]) in ((n,), (n, 1))


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
    factors = (saved_value(node, "self"), saved_value(node, "other"))
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
    return bool(((a - b).abs() <= _MAX_DIFFERENCE).all())
