"""WalkPlan: repeat a walk over a graph that has the structure of an earlier one.

Most steps of a training build the same graph. Comparing it with the last one is faster than to
decide about each of its nodes again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from operator import itemgetter
from typing import Any

from torch import Tensor

from tda_lightning.gradients.capture.layout_inference import Layout
from tda_lightning.gradients.capture.layout_memory import LayoutMemory
from tda_lightning.gradients.graph.sample_layout import KnownRows, SampleLayout
from tda_lightning.gradients.graph.walk import Edge, Meeting, Node, Normalized, Walk
from tda_lightning.gradients.nodes.stacked import Slot

# Instead of the number of a node: one that no earlier node leads to, and none at all.
_NEW, _NONE = -1, -2
# Instead of a parameter: some tensor that is not recorded.
_OTHER = object()


class GraphStructure:
    """Which nodes of a graph lead where, and the parameters at its leaves.

    Nodes are numbered in the order in which a breadth-first search finds them.
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


# Structures of graphs that are remembered: a training may alternate between losses.
_MAX_PLANS = 4
# Sizes of batches for which the layouts of a node are remembered.
_MAX_SIZES = 256

SlotOf = Callable[[Meeting], Slot | None]
# The number of samples, and the shape of a node's output.
_Sizes = tuple[int, tuple[int, ...]]


@dataclass(slots=True)
class _PlannedMeeting:
    """A meeting by the number of its node.

    Attributes:
        inputs: Positions of its inputs, each with a number of a node and of its output.
        slot: Where it is recorded together with others, if it is.
        layouts: The layouts of its inputs by the sizes of a batch.
    """

    number: int
    inputs: tuple[tuple[int, int, int], ...]
    is_first: bool
    slot: Slot | None
    layouts: dict[_Sizes, list[Layout | None]] = field(default_factory=dict)

    def places(self, nodes: Sequence[Node]) -> list[tuple[int, Edge]]:
        """Return the positions of the inputs with their edges in a graph."""
        return [(position, (nodes[child], output)) for position, child, output in self.inputs]

    def meeting(self, nodes: Sequence[Node], n: int) -> Meeting:
        """Return the meeting in a graph of ``n`` samples."""
        node = nodes[self.number]
        layouts = self.layouts.get((n, tuple(node._input_metadata[0].shape)), [])
        return Meeting(node, self.places(nodes), self.is_first, layouts)


class _WalkPlan:
    """A walk, by the numbers of the nodes of a graph."""

    def __init__(self, loss: Tensor, walk: Walk, layouts: LayoutMemory, slot_of: SlotOf) -> None:
        self._layouts = layouts
        self._n_exceptions = layouts.n_exceptions
        self._structure = GraphStructure(loss.grad_fn, walk.inputs, layouts.recorded)
        numbers = self._structure.numbers
        self._meetings = [
            _PlannedMeeting(
                numbers[meeting.node],
                tuple((position, numbers[e[0]], e[1]) for position, e in meeting.inputs),
                meeting.is_first,
                None if meeting.node in walk.normalized else slot_of(meeting),
            )
            for meeting in walk.single
        ]
        self._with_samples = [numbers[node] for node in walk.with_samples]
        self._by_shape = [
            (numbers[node], position, numbers[edge[0]], edge[1], answer)
            for node, position, edge, answer in layouts.by_shape
        ]
        self._checkpoints = [numbers[node] for node in walk.checkpoints]
        self._normalized = [
            (numbers[entry.norm], [numbers[node] for node in entry.chain], entry.by_batch)
            for entry in walk.normalized.values()
        ]
        self._is_sampleless = walk.is_sampleless
        self._structure.forget_nodes()

    def walk(self, loss: Tensor, n: int) -> Walk | None:
        """Return the result of a walk over a graph, ``None`` if it may be another one."""
        if self._layouts.n_exceptions != self._n_exceptions:
            return None
        nodes = self._structure.nodes_of(loss.grad_fn)
        if nodes is None or not self._is_alike(nodes, n):
            return None
        result = Walk(
            with_samples=set(_items(nodes, self._with_samples)),
            checkpoints=_items(nodes, self._checkpoints),
            is_sampleless=self._is_sampleless,
        )
        for norm, chain, by_batch in self._normalized:
            links = tuple(_items(nodes, chain))
            result.normalized[links[-1]] = Normalized(nodes[norm], links, by_batch)
        self._layouts.resume(n, result.with_samples)
        return result if self._add_meetings(result, nodes, n) else None

    def _is_alike(self, nodes: Sequence[Node], n: int) -> bool:
        """Return whether the facts agree that the walk did not read from the structure."""
        self._layouts.resume(n, set())
        return all(
            self._layouts.has_samples(nodes[number], position, (nodes[child], output)) == answer
            for number, position, child, output, answer in self._by_shape
        ) and all(
            bool(getattr(nodes[norm], "_saved_training", True)) == by_batch
            for norm, _, by_batch in self._normalized
        )

    def _add_meetings(self, result: Walk, nodes: Sequence[Node], n: int) -> bool:
        """Add all meetings, and return whether their layouts are known."""
        alike: list[_PlannedMeeting] = []
        for planned in self._meetings:
            node = nodes[planned.number]
            sizes = n, tuple(node._input_metadata[0].shape)
            layouts = planned.layouts.get(sizes)
            if layouts is None:
                layouts = self._layouts.settled(node, planned.places(nodes))
                if layouts is None:
                    return False
                if len(planned.layouts) < _MAX_SIZES:
                    planned.layouts[sizes] = layouts
            if planned.slot is not None and all(map(_is_contiguous, layouts)):
                result.alike.append((node, planned.slot))
                alike.append(planned)
            else:
                places = planned.places(nodes)
                result.single.append(Meeting(node, places, planned.is_first, layouts))
        result.as_meetings = lambda: [planned.meeting(nodes, n) for planned in alike]
        return True


def _is_contiguous(layout: Layout | None) -> bool:
    return isinstance(layout, SampleLayout) and layout.is_contiguous


def _items(nodes: Sequence[Node], numbers: Sequence[int]) -> list[Node]:
    if len(numbers) < 2:
        return [nodes[number] for number in numbers]
    return list(itemgetter(*numbers)(nodes))


class WalkPlans:
    """Walks over the graphs of losses, and repeats walks over graphs of the same structure.

    ``alone`` pauses the model's other captures, since layouts are proved by extra passes.
    """

    def __init__(
        self,
        layouts: LayoutMemory,
        slot_of: SlotOf,
        alone: Callable[[], AbstractContextManager[None]],
    ) -> None:
        self._layouts, self._slot_of, self._alone = layouts, slot_of, alone
        self._plans: list[_WalkPlan] = []

    def walk(self, loss: Tensor, n: int, known: KnownRows) -> Walk:
        """Return the meetings in a loss's graph, with layouts that are proved for new ones."""
        for plan in self._plans:
            result = plan.walk(loss, n)
            if result is not None:
                return result
        with self._alone():
            result = self._layouts.walk(loss, n, known)
        if result.is_reentrant or loss.grad_fn is None:
            return result
        if self._layouts.irregular:  # Such rows are traced in each batch.
            return replace(result, inputs={})
        plan = _WalkPlan(loss, result, self._layouts, self._slot_of)
        planned = plan.walk(loss, n)
        if planned is None:  # Some layouts are not decided yet.
            return replace(result, inputs={})
        self._plans = [plan, *self._plans][:_MAX_PLANS]
        return planned
