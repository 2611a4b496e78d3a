"""NormsBehind: the batch norms behind recorded weights, while a backward pass runs."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from torch import Tensor

from tda_lightning.gradients.graph.irregular_rows import IrregularRows
from tda_lightning.gradients.graph.sample_layout import SampleLayout
from tda_lightning.gradients.graph.walk import Edge, Node, Normalized, Walk, leaves
from tda_lightning.gradients.nodes import Contribution, NodeCall
from tda_lightning.gradients.nodes.normalized import (
    NormBackward,
    contribution_in_front_of,
    has_statistics,
    is_followed,
)


class NormsBehind:
    """Adds to the rows of a weight the effect through the statistics of a batch norm behind it.

    A norm in evaluation mode has constant statistics. Its rows include the effect only for weights
    whose training used the statistics of the batch: the running ones follow those.

    Args:
        recorded: The names of the recorded parameters.
        followed: Names of parameters whose effect is included in evaluation mode as well.

    Attributes:
        names: Names of the parameters that a norm with the statistics of the batch has followed.
    """

    def __init__(self, recorded: Mapping[Tensor, str], followed: Collection[str]) -> None:
        self._recorded, self._followed = recorded, frozenset(followed)
        self._norms: dict[Node, Normalized] = {}
        self._passed: dict[Node, NormBackward] = {}
        self.names: set[str] = set()

    def start(self, walk: Walk) -> None:
        """Forget the last pass, and find the norms of a graph."""
        self.end()
        if not walk.normalized:
            return
        recorded = {meeting.node for meeting in walk.meetings}
        self._norms = {
            entry.norm: entry
            for entry in walk.normalized.values()
            if (entry.by_batch or self._followed)
            and entry.chain[-1] in recorded
            and is_followed(entry.chain[-1])
        }

    def end(self) -> None:
        """Forget the pass."""
        self._norms, self._passed = {}, {}

    def note(
        self,
        node: Node,
        inputs: Sequence[tuple[int, Edge, SampleLayout | IrregularRows]],
        grads: tuple[Tensor | None, ...],
        n: int,
    ) -> None:
        """Remember what a batch norm's node holds: it is gone when the layer's is reached."""
        if not self._norms:
            return
        entry = self._norms.get(node)
        layout = inputs[0][2] if inputs else None
        if entry is None or layout is None or grads[0] is None:
            return
        passed = NormBackward.of(NodeCall(node, grads, 1, (), layout, n))
        if passed is not None:
            self._passed[entry.chain[-1]] = passed

    def contribution(self, call: NodeCall, edge: Edge) -> Contribution | None:
        """Return the gradients of a weight with a batch norm behind it, ``None`` for others."""
        norm = self._passed.get(call.node) if self._passed else None
        if norm is None or not has_statistics(call):
            return None
        names = {self._recorded[leaf] for leaf in leaves(edge) if leaf in self._recorded}
        if norm.by_batch:
            self.names |= names
        elif not names & self._followed:
            return None
        del self._passed[call.node]
        return contribution_in_front_of(norm, call)
