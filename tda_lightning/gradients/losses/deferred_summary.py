"""DeferredSummary: facts of small losses, computed for many batches at once.

The facts of one small batch take some ninety operations, each of which takes longer to start than
to run. So a cross-entropy of few classes only keeps its tensors, until :func:`facts_of` joins them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, fields
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from tda_lightning.gradients.graph.sample_layout import SampleLayout
from tda_lightning.gradients.losses.loss_graph import LossFacts, LossSummary
from tda_lightning.gradients.losses.loss_nodes import LossNode, Predictions, SoftmaxLoss
from tda_lightning.gradients.losses.term_owners import TermOwners, is_picked

# Numbers of a batch that are kept at most: beyond it, an operation takes longer than its start.
_MAX_KEPT = 2**14


@dataclass(frozen=True)
class _JoinedNode:
    """Stands for the softmax nodes of several batches."""

    _saved_result: Tensor
    _saved_dim: int = 1


class DeferredSummary(LossSummary):
    """A summary whose facts are computed by :func:`facts_of`.

    The arguments are those of :class:`LossSummary`.
    """

    # Log-probabilities, their gradients and those of the outputs, each ``(n, classes)``.
    kept: Tensor | None = None
    # Whether rows of the batch are in no regular order, so that terms may be too.
    is_irregular = False

    def add(self, node: LossNode, value_grad: Tensor, outputs_grad: Tensor) -> None:
        """Keep the tensors of a small cross-entropy whose terms are surely those of the samples."""
        is_in_order = not self.is_irregular and not is_picked(node, self.n)
        if is_in_order and self._is_small(node, value_grad):
            self._keep(node, value_grad, outputs_grad)
        else:
            super().add(node, value_grad, outputs_grad)

    def add_terms(
        self, node: LossNode, owners: TermOwners, value_grad: Tensor, outputs_grad: Tensor
    ) -> None:
        """Keep the tensors of a small cross-entropy; summarize any other loss function now."""
        if owners.rows is None and self._is_small(node, value_grad):
            self._keep(node, value_grad, outputs_grad)
        else:
            super().add_terms(node, owners, value_grad, outputs_grad)

    def _is_small(self, node: LossNode, value_grad: Tensor) -> bool:
        """Return whether a loss function is a cross-entropy of few numbers, one row per sample."""
        is_small = value_grad.ndim == 2 and value_grad.numel() <= _MAX_KEPT
        is_of_classes = isinstance(node, SoftmaxLoss) and node.class_axis == 1
        return self.n_functions == 1 and is_small and is_of_classes and len(value_grad) == self.n

    def _keep(self, node: LossNode, value_grad: Tensor, outputs_grad: Tensor) -> None:
        # A copy, since a training may change its log-probabilities in place.
        self.kept = torch.stack((node.saved("result"), value_grad, outputs_grad))

    def facts(self) -> LossFacts:
        """Return the facts of each sample's loss, after the backward pass."""
        return facts_of([self])[0]

    def in_order(self, place: Int[Tensor, " n"]) -> DeferredSummary:
        """Return the summary of a batch whose samples come in another order."""

        def moved(parts: Sequence[Tensor]) -> list[Tensor]:
            return [part[place.to(part.device)] for part in parts]

        other = copy(self)
        other._sums = moved(self._sums)
        other._predictions = [each and Predictions(*moved(each)) for each in self._predictions]
        other.kept = None if self.kept is None else self.kept[:, place.to(self.kept.device)]
        return other


def facts_of(summaries: Sequence[DeferredSummary]) -> list[LossFacts]:
    """Return the facts of each batch, after its backward pass."""
    groups: dict[object, list[int]] = defaultdict(list)
    facts = []
    for place, summary in enumerate(summaries):
        facts.append(LossSummary.facts(summary))
        if (kept := summary.kept) is not None:
            groups[kept.shape[2], kept.dtype, kept.device].append(place)
    for places in groups.values():
        parts = _joint_facts([summaries[place] for place in places])
        for place, part in zip(places, parts, strict=True):
            facts[place] = part
    return facts


def _joint_facts(summaries: Sequence[DeferredSummary]) -> list[LossFacts]:
    kept = [summary.kept for summary in summaries if summary.kept is not None]
    log_probabilities, value_grad, outputs_grad = torch.cat(kept, dim=1)
    joint = LossSummary((), len(value_grad))
    owners = TermOwners.of(SampleLayout(0, 1, 1), value_grad.shape, len(value_grad))
    joint.add_terms(SoftmaxLoss(_JoinedNode(log_probabilities)), owners, value_grad, outputs_grad)
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
