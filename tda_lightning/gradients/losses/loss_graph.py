"""Find loss functions on a loss's autograd graph, and gather facts of each sample's loss there."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tda_lightning.gradients.losses.binary_losses import BernoulliLogitsLoss, BernoulliLoss
from tda_lightning.gradients.losses.loss_nodes import LossNode, Predictions, SoftmaxLoss
from tda_lightning.gradients.losses.regression_losses import HuberLoss, SquaredLoss, SquarePower
from tda_lightning.gradients.losses.term_owners import RowsOf, TermOwners, term_owners
from tda_lightning.gradients.nodes.saved_values import is_checkpointed, what_reopens

# Loss functions are near the root of the graph; the model behind them may be large.
_MAX_SEARCHED_NODES = 500
# The least share of a batch's loss that is known, so that it describes the samples' losses.
_LEAST_SHARE = 0.1

_KINDS: dict[str, type[LossNode]] = {
    "LogSoftmaxBackward0": SoftmaxLoss,
    "BinaryCrossEntropyWithLogitsBackward0": BernoulliLogitsLoss,
    "BinaryCrossEntropyBackward0": BernoulliLoss,
    "MseLossBackward0": SquaredLoss,
    "HuberLossBackward0": HuberLoss,
    "SmoothL1LossBackward0": HuberLoss,
}


def find_losses(loss: Tensor, with_samples: Collection[Any]) -> list[LossNode]:
    """Return the loss functions near the root of a loss's graph, in order of their distance.

    A function of parameters alone, such as a squared weight, is a penalty, not a loss of samples.

    Args:
        loss: The loss of a batch, with its graph.
        with_samples: The nodes of the graph whose outputs depend on samples; functions of others
            are left out.
    """
    return [
        loss_node
        for loss_node in find_losses_and_penalties(loss)
        if any(child in with_samples for child in _children(loss_node.node))
    ]


def find_losses_and_penalties(loss: Tensor) -> list[LossNode]:
    """Return the loss functions near the root, including penalties on parameters.

    A square that multiplies another loss function is a weight of its terms, as in a focal loss.
    """
    waiting, parents = deque([loss.grad_fn]), {loss.grad_fn: list[Any]()}
    found = []
    while waiting and len(parents) < _MAX_SEARCHED_NODES:
        node = waiting.popleft()
        kind = _kind_of(node)
        if kind is not None:
            found.append(kind(node))
            continue
        for child in _children(node):
            if child not in parents:
                parents[child] = []
                waiting.append(child)
            parents[child].append(node)
    others = [node.node for node in found if not isinstance(node, SquarePower)]
    return [
        each
        for each in found
        if not isinstance(each, SquarePower)
        or not any(_are_multiplied(each.node, other, parents) for other in others)
    ]


def _are_multiplied(a: Any, b: Any, parents: Mapping[Any, Sequence[Any]]) -> bool:
    """Return whether functions of two nodes are multiplied with one another."""
    above_a, above_b = _with_ancestors(a, parents), _with_ancestors(b, parents)
    products = (node for node in above_a & above_b if node.name() == "MulBackward0")
    factors = (list(_children(node)) for node in products)
    return any(
        (x in above_a - above_b and y in above_b - above_a)
        or (x in above_b - above_a and y in above_a - above_b)
        for x, y in (pair for pair in factors if len(pair) == 2)
    )


def _with_ancestors(node: Any, parents: Mapping[Any, Sequence[Any]]) -> set[Any]:
    waiting, above = [node], {node}
    while waiting:
        new = set(parents[waiting.pop()]) - above
        above |= new
        waiting += new
    return above


def nodes_near(loss: Tensor) -> list[Any]:
    """Return the nodes near the root of a loss's graph, in order of their distance."""
    if loss.grad_fn is None:
        return []
    nodes = {loss.grad_fn: None}  # In order of insertion.
    waiting = deque(nodes)
    while waiting and len(nodes) < _MAX_SEARCHED_NODES:
        for child in _children(waiting.popleft()):
            if child not in nodes:
                nodes[child] = None
                waiting.append(child)
    return list(nodes)


def _kind_of(node: Any) -> type[LossNode] | None:
    if node is None:
        return None
    if node.name() == "PowBackward0" and node._saved_exponent == 2:
        return SquarePower
    return _KINDS.get(node.name())


def _children(node: Any) -> Iterator[Any]:
    if node is not None:
        yield from (child for child, _ in node.next_functions if child is not None)


def term_weights(loss: Tensor, nodes: Sequence[LossNode]) -> list[Tensor | None]:
    """Return the weights in ``loss`` of each loss function's terms; ``None`` if it is unused."""
    grads = torch.autograd.grad(
        loss, [node.value for node in nodes], retain_graph=True, allow_unused=True
    )
    with torch.no_grad():
        return [
            None if grad is None else node.weights(grad)
            for node, grad in zip(nodes, grads, strict=True)
        ]


@dataclass(frozen=True)
class LossFacts:
    """Facts of each sample's loss in a batch, each of them ``None`` if unknown.

    Attributes:
        terms: Number of loss terms that each sample's loss is the mean of.
        spread: Second derivative of each sample's loss with respect to the outputs of its labels,
            divided by its squared gradient there. Both are weighted as in the loss of the batch.
            It is NaN where the loss is mostly another function of the outputs.
        full_spread: Trace of each sample's Hessian with respect to all outputs, likewise.
        losses: Mean of each sample's terms. It is NaN if none of them has a weight, and where
            `spread` is.
        errors: Norm of the difference between predicted probabilities and label.
        margins: Logit of the label minus the highest other logit.
    """

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
        rows_of: Returns where the samples lie in a node's output, as far as that is known.
        value: The loss of the batch, to compare the loss functions with, if it is known.

    Attributes:
        name: Name of the losses, empty if they are not supported.
        n: Number of samples in the batch.
        n_functions: Number of loss functions.
    """

    def __init__(
        self,
        nodes: Sequence[LossNode],
        n: int,
        is_paused: Callable[[], bool] = lambda: False,
        rows_of: RowsOf | None = None,
        value: Tensor | None = None,
    ) -> None:
        self._is_paused, self._rows_of = is_paused, rows_of
        self._value = None if value is None else value.detach()
        self.n, self.n_functions = n, len(nodes)
        self.name = " and ".join(sorted({node.name for node in nodes}))
        # Sums over terms of a sample: weights, their squares, losses, traces, squared gradients.
        self._sums: list[Tensor] = []
        self._predictions: list[Predictions | None] = []
        # Terms without a known sample: the others would be a part of the loss only.
        self._is_partial = False
        for node in nodes:
            self._add_hooks(node)

    def _add_hooks(self, node: LossNode) -> None:
        # The hook must not hold the node, which holds the hook: a cycle would keep its tensors.
        waiting, position = [node], node.position
        reopeners: list[Callable[[], None]] = []

        def prehook(outputs: tuple[Tensor | None, ...]) -> None:
            if waiting and not self._is_paused():
                reopeners.append(what_reopens(waiting[0].node))

        def hook(inputs: tuple[Tensor | None, ...], outputs: tuple[Tensor | None, ...]) -> None:
            value_grad, outputs_grad = outputs[0], inputs[position]
            if not waiting or self._is_paused() or value_grad is None or outputs_grad is None:
                return
            for reopen in reopeners:
                reopen()
            reopeners.clear()
            with torch.no_grad():
                self.add(waiting.pop(), value_grad, outputs_grad)

        node.node.register_hook(hook)
        if is_checkpointed(node.node):
            node.node.register_prehook(prehook)

    def add(self, node: LossNode, value_grad: Tensor, outputs_grad: Tensor) -> None:
        """Add a loss function, with the gradients of the loss at its result and its outputs."""
        owners = term_owners(node, self.n, self._rows_of)
        if owners is None:
            self._is_partial = True
        else:
            self.add_terms(node, owners, value_grad, outputs_grad)

    def add_terms(
        self, node: LossNode, owners: TermOwners, value_grad: Tensor, outputs_grad: Tensor
    ) -> None:
        """Add the terms of a loss function, whose samples are known."""
        weights = node.weights(value_grad)
        divisors = torch.where(weights == 0, 1, weights)
        terms = node.summarize(outputs_grad, divisors)
        # Only then is a label one of few classes: a look at all of a vocabulary takes time.
        is_one_term = weights.numel() == self.n and owners.rows is None
        predictions = node.predictions(value_grad, outputs_grad, divisors) if is_one_term else None
        facts = predictions and Predictions(*(owners.sums(each) for each in predictions))
        self._predictions.append(facts)
        if predictions is None:
            loss = node.losses(value_grad, divisors, terms.square)
        else:
            loss = predictions.loss
        loss = torch.where(terms.square.isnan(), torch.nan, loss)
        squares = weights.square()
        parts = [weights, squares, weights * loss, weights * terms.trace, squares * terms.square]
        parts += [weights * terms.full_trace, squares * terms.full_square]
        sums = [owners.sums(part) for part in parts]
        self._sums = [a + b for a, b in zip(self._sums, sums, strict=True)] if self._sums else sums

    def facts(self) -> LossFacts:
        """Return the facts of each sample's loss, after the backward pass."""
        if self._is_partial or not self._sums:
            return LossFacts()
        total, squares, loss, trace, square, full_trace, full_square = self._sums
        if self._value is not None:
            # Such as the squared means in the KL divergence of an autoencoder with another loss.
            is_minor = loss.sum().abs() < _LEAST_SHARE * self._value.abs()
            loss, trace, full_trace = (
                torch.where(is_minor, torch.nan, each) for each in (loss, trace, full_trace)
            )
        is_counted = total != 0
        # Labels that two loss functions share have two predictions.
        predictions = self._predictions[0] if len(self._predictions) == 1 else None
        errors, margins = (
            None if values is None else torch.where(is_counted, values, torch.nan)
            for values in (predictions[1:] if predictions else (None, None))
        )
        return LossFacts(
            terms=torch.where(squares > 0, total.square() / squares, 1),
            spread=torch.where(square == 0, 0, trace / square),
            full_spread=torch.where(full_square == 0, 0, full_trace / full_square),
            losses=torch.where(is_counted, loss / total, torch.nan),
            errors=errors,
            margins=margins,
        )
