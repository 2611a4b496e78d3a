"""DeferredSummary: facts of small losses, computed for many batches at once.

The facts of one small batch take some twenty operations, each of which takes longer to start than
to run. So a cross-entropy of few classes only keeps its tensors, until :func:`facts_of` joins them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tda_lightning.gradients.graph.sample_layout import SampleLayout
from tda_lightning.gradients.losses.loss_graph import LossFacts, LossSummary
from tda_lightning.gradients.losses.loss_nodes import LossNode, SoftmaxLoss
from tda_lightning.gradients.losses.term_owners import TermOwners

# Numbers of a batch that are kept at most: beyond it, an operation takes longer than its start.
_MAX_KEPT = 2**14


class _Kept(NamedTuple):
    """A cross-entropy's log-probabilities and gradients, each of shape ``(n, classes)``."""

    log_probabilities: Tensor
    value_grad: Tensor
    outputs_grad: Tensor

    def key(self) -> object:
        """Return what batches that can be joined have in common."""
        return tuple((part.shape[1], part.dtype, part.device) for part in self)


@dataclass(frozen=True)
class _JoinedNode:
    """Stands for the softmax nodes of several batches."""

    _saved_result: Tensor
    _saved_dim: int = 1


class DeferredSummary(LossSummary):
    """A summary whose facts are computed by :func:`facts_of`.

    Args:
        nodes: The loss functions of a batch, before its backward pass.
        n: Number of samples in the batch.
    """

    def __init__(self, nodes: Sequence[LossNode], n: int) -> None:
        super().__init__(nodes, n)
        self._is_alone = len(nodes) == 1
        self.kept: _Kept | None = None

    @property
    def n(self) -> int:
        """Number of samples in the batch."""
        return self._n

    def add(
        self, node: LossNode, owners: TermOwners | None, value_grad: Tensor, outputs_grad: Tensor
    ) -> None:
        """Keep the tensors of a small cross-entropy; summarize any other loss function now."""
        is_small = value_grad.ndim == 2 and value_grad.numel() <= _MAX_KEPT
        is_of_classes = isinstance(node, SoftmaxLoss) and node.class_axis == 1
        if self._is_alone and is_small and is_of_classes and len(value_grad) == self._n:
            # Copies, since a training may change its log-probabilities in place.
            parts = (node.node._saved_result, value_grad, outputs_grad)
            self.kept = _Kept(*(part.detach().clone() for part in parts))
        else:
            super().add(node, owners, value_grad, outputs_grad)


def facts_of(summaries: Sequence[DeferredSummary]) -> list[LossFacts]:
    """Return the facts of each batch, after its backward pass."""
    groups: dict[object, list[int]] = defaultdict(list)
    facts = []
    for place, summary in enumerate(summaries):
        facts.append(summary.facts())
        if summary.kept is not None:
            groups[summary.kept.key()].append(place)
    for places in groups.values():
        parts = _joint_facts([summaries[place] for place in places])
        for place, part in zip(places, parts, strict=True):
            facts[place] = replace(part, name=facts[place].name)
    return facts


def _joint_facts(summaries: Sequence[DeferredSummary]) -> list[LossFacts]:
    kept = [summary.kept for summary in summaries if summary.kept is not None]
    log_probabilities, value_grad, outputs_grad = map(torch.cat, zip(*kept, strict=True))
    joint = LossSummary((), len(value_grad))
    owners = TermOwners.of(SampleLayout(0, 1, 1), value_grad.shape, len(value_grad))
    joint.add(SoftmaxLoss(_JoinedNode(log_probabilities)), owners, value_grad, outputs_grad)
    facts, sizes = joint.facts(), [summary.n for summary in summaries]
    columns: dict[str, Any] = {
        field.name: torch.split(values, sizes)
        for field in fields(facts)
        if isinstance(values := getattr(facts, field.name), Tensor)
    }
    return [
        LossFacts(**{name: parts[place] for name, parts in columns.items()})
        for place in range(len(sizes))
    ]
