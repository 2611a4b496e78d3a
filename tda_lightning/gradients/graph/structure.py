"""GraphStructure: recognize a graph that looks like an earlier one.

Most steps of a training build the same graph. Comparing it with the last one is faster than to
decide about each of its nodes again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from tda_lightning.gradients.graph.walk import Edge, Node

# Instead of the number of a node: one that no earlier node leads to, and none at all.
_NEW, _NONE = -1, -2
# Instead of a parameter: some tensor that is not recorded.
_OTHER = object()


class GraphStructure:
    """Which nodes of a graph lead where, and the parameters at its leaves.

    Nodes are numbered in the order in which a breadth-first search finds them.

    Args:
        root: The node of the loss.
        inputs: The inputs of all nodes.
        recorded: The recorded parameters.
    """

    def __init__(
        self, root: Node, inputs: Mapping[Node, tuple[Edge, ...]], recorded: Mapping[Tensor, object]
    ) -> None:
        self._recorded = recorded
        self.numbers: dict[Node, int] = {root: 0}
        # For each node its kind, the tensor of a leaf, and for each input a number and an output.
        self._entries: list[tuple[Any, Any, tuple[tuple[int, int], ...]]] = []
        nodes = [root]
        for node in nodes:
            links = []
            for child, output in inputs[node]:
                number = _NONE if child is None else self.numbers.get(child, _NEW)
                if number == _NEW:
                    self.numbers[child] = len(nodes)
                    nodes.append(child)
                links.append((number, output))
            self._entries.append((type(node), self._leaf(node), tuple(links)))

    def forget_nodes(self) -> None:
        """Let go of the graph, whose nodes may hold tensors."""
        self.numbers = {}

    def nodes_of(self, root: Node) -> list[Node] | None:
        """Return the nodes of another graph, or ``None`` if it has another structure."""
        nodes: list[Node] = [root]
        add = nodes.append
        for node, (kind, leaf, links) in zip(nodes, self._entries, strict=False):
            if type(node) is not kind or (leaf is not None and not self._has_leaf(node, leaf)):
                return None
            functions: Sequence[Edge] = () if leaf is not None else node.next_functions
            if len(functions) != len(links):
                return None
            for (child, output), (number, same_output) in zip(functions, links, strict=True):
                if number == _NEW:
                    add(child)
                elif child is not (None if number == _NONE else nodes[number]):
                    return None
                if output != same_output:
                    return None
        # No node is where another one was expected.
        return nodes if len(set(nodes)) == len(self._entries) else None

    def _has_leaf(self, node: Node, leaf: Any) -> bool:
        return node.variable is leaf or self._leaf(node) is leaf

    def _leaf(self, node: Node) -> Any:
        variable = getattr(node, "variable", None)
        return variable if variable is None or variable in self._recorded else _OTHER
