"""LayoutMemory: where the samples lie in each node in which a parameter meets data.

A layout is inferred from shapes when a kind of meeting is seen for the first time, then proved in
that batch, and remembered for all later batches.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from tda_lightning.gradients.capture.probe import PROVEN, Evidence, certainty, probe
from tda_lightning.gradients.graph.routing import RoutedRows, picked_rows
from tda_lightning.gradients.graph.sample_layout import SampleLayout, possible_layouts
from tda_lightning.gradients.graph.walk import (
    Edge,
    Meeting,
    Node,
    Walk,
    leaves,
    output_shape,
    walk,
)
from tda_lightning.gradients.nodes.rule import rule_for
from tda_lightning.stores.recipe import SampleAxis

# Walks of one batch until all layouts are decided; each moves a meeting nearer to the loss.
_MAX_WALKS = 8
# Batches in which no gradient arrives at a meeting before its inferred layout is trusted.
_MAX_EMPTY_PROBES = 3

# The parameter, the kind of node, the position of the input, and what its shape has to do with n.
_Key = tuple[Any, ...]
# The same without the shape.
_Kind = tuple[Any, type, int]
Layout = SampleLayout | RoutedRows
# Earlier batches do not show where the samples lie.
UNKNOWN: Any = object()


@dataclass
class LayoutMemory:
    """Infers, proves and remembers layouts.

    Attributes:
        recorded: The recorded parameters.
        declared: The axis of the samples of parameters for which the user has declared it.
        lost: Why the rows of a parameter cannot be told apart, by parameter.
        n: Number of samples of the last batch.
        by_shape: The nodes of the last graph whose shape told whether they have samples, each with
            the position of an input, its edge, and the answer.
    """

    recorded: Mapping[Tensor, object]
    declared: Mapping[Tensor, SampleAxis] = field(default_factory=dict)
    lost: dict[nn.Parameter, str] = field(default_factory=dict)
    n: int = 1
    _decided: dict[_Key, Layout | None] = field(default_factory=dict)
    by_shape: list[tuple[Node, int, Edge, bool]] = field(default_factory=list)
    _do_samples_mix: bool = False
    _with_samples: set[Node] = field(default_factory=set)
    _empty_probes: dict[_Key, int] = field(default_factory=dict)
    # The last shape, batch size and layout of a kind of meeting: most batches look the same.
    _last: dict[_Kind, tuple[tuple[int, ...], int, Layout | None]] = field(default_factory=dict)

    def walk(self, loss: Tensor, n: int) -> Walk:
        """Return the meetings in a loss's graph, with layouts that are proved for new ones."""
        self.n = n
        for _ in range(_MAX_WALKS):
            self._with_samples, self.by_shape = set(), []
            result = walk(loss.grad_fn, self.recorded, self._has_samples)
            self._with_samples = result.with_samples
            # A reentrant checkpoint does not allow the extra backward pass of a proof.
            if n == 1 or result.is_reentrant or not self._decide(loss, result):
                return result
        return result

    def continue_walk(self, root: Node, visited: dict[Node, tuple[Edge, ...]]) -> Walk:
        """Return the meetings in a part of the graph that is built during the backward pass."""
        return walk(root, self.recorded, self._has_samples, visited)

    def layout(self, node: Node, position: int, edge: Edge) -> Layout | None:
        """Return the layout at one input of a node, ``None`` if there is none."""
        layout: Layout | None = self._last_layout(node, position, edge)
        if layout is not UNKNOWN:
            return layout
        key = self._key(node, position, edge)
        if key not in self._decided:
            return self._inferred(node, position, edge)
        shape = node._input_metadata[0].shape
        layout = self._decided[key]
        if isinstance(layout, SampleLayout) and not layout.fits(shape, self.n):
            layout = self._inferred(node, position, edge)
        self._last[_a_parameter(edge), type(node), position] = (shape, self.n, layout)
        return layout

    def _last_layout(self, node: Node, position: int, edge: Edge) -> Any:
        """Return the layout in the last batch, ``UNKNOWN`` if shapes have changed since."""
        last = self._last.get((_a_parameter(edge), type(node), position))
        if last is None or last[1] != self.n or last[0] != node._input_metadata[0].shape:
            return UNKNOWN
        return last[2]

    def resume(self, n: int, with_samples: set[Node]) -> None:
        """Continue with a graph that needs no walk.

        Args:
            n: Number of samples of its batch.
            with_samples: Its nodes whose outputs depend on samples.
        """
        self.n, self._with_samples = n, with_samples

    def forget_graph(self) -> None:
        """Let go of the nodes of the last graph."""
        self._with_samples, self.by_shape = set(), []

    def settled(self, node: Node, inputs: Sequence[tuple[int, Edge]]) -> list[Layout | None] | None:
        """Return the layouts at inputs of a node, ``None`` if one of them may still change."""
        if self.n > 1 and any(self._key(node, *place) not in self._decided for place in inputs):
            return None
        return [self.layout(node, *place) for place in inputs]

    def has_samples(self, node: Node, position: int, edge: Edge) -> bool:
        """Return whether the shape of a node, in which parameters are alone, shows samples."""
        return self.layout(node, position, edge) is not None

    def _has_samples(self, node: Node, position: int, edge: Edge) -> bool:
        answer = self.has_samples(node, position, edge)
        self.by_shape.append((node, position, edge, answer))
        return answer

    def _inferred(self, node: Node, position: int, edge: Edge) -> Layout | None:
        shape = output_shape((node, 0))
        axes = self._axes(node, position, edge)
        if self.n == 1 and axes:
            return SampleLayout(axes[0], 1, None)
        declared = self._declared(shape, axes, edge)
        if declared is not None:
            return declared
        route = next(self._possible_routes(node), None) if 0 in axes else None
        return route or next(possible_layouts(shape, self.n, axes), None)

    def _axes(self, node: Node, position: int, edge: Edge) -> Sequence[int]:
        shape = output_shape((node, 0))
        return list(rule_for(node).axes(shape, output_shape(edge), position))

    def _declared(self, shape: tuple[int, ...], axes: Sequence[int], edge: Edge) -> Layout | None:
        """Return the layout that the user has declared, if the shape allows it."""
        declared = self.declared.get(_a_parameter(edge))
        if declared is None or not axes:
            return None
        if declared in axes and shape[int(declared)] == self.n:
            layout = SampleLayout(int(declared), 1, None)
        elif declared in ("flattened", 0):
            layout = SampleLayout(axes[0], 1, None)
        else:  # The layer has joined the samples with the axes in front of them.
            layout = SampleLayout(axes[0], None, 1)
        return layout if layout.fits(shape, self.n) else None

    def _key(self, node: Node, position: int, edge: Edge) -> _Key:
        shape, n = output_shape((node, 0)), self.n
        fits = tuple((size == n, size % n == 0) for size in shape[:3])
        return (_a_parameter(edge), type(node).__name__, position, len(shape), fits, n == 1)

    def _decide(self, loss: Tensor, result: Walk) -> bool:
        """Prove the layouts that are not decided yet; return whether the graph looks different."""
        open_inputs = list(self._undecided(result))
        if not open_inputs:
            return False
        axes: dict[Node, list[int]] = {}
        for meeting, position, edge, _ in open_inputs:
            wanted = axes.setdefault(meeting.node, [])
            wanted += [a for a in self._axes(meeting.node, position, edge) if a not in wanted]
        evidence = probe(loss, result, axes, self.n)
        self._do_samples_mix = result.has_batch_statistics or certainty(evidence) < PROVEN
        is_changed = False
        for meeting, position, edge, key in open_inputs:
            is_changed |= self._judge(meeting, position, edge, key, evidence.get(meeting.node))
        return is_changed

    def _undecided(self, result: Walk) -> Iterator[tuple[Meeting, int, Edge, _Key]]:
        """Yield the inputs whose layouts no batch has shown; note the others' layouts."""
        for meeting in result.meetings:
            node = meeting.node
            meeting.layouts = [self._last_layout(node, *place) for place in meeting.inputs]
            for (position, edge), layout in zip(meeting.inputs, meeting.layouts, strict=True):
                if layout is UNKNOWN:
                    key = self._key(node, position, edge)
                    if key not in self._decided:
                        yield meeting, position, edge, key

    def _judge(
        self, meeting: Meeting, position: int, edge: Edge, key: _Key, evidence: Evidence | None
    ) -> bool:
        """Decide about one input of a meeting; return whether it turned out to have no samples."""
        inferred = self._inferred(meeting.node, position, edge)
        if _a_parameter(edge) in self.declared and inferred is not None:
            self._decided[key] = inferred
            return False
        if evidence is None or evidence.is_empty:
            self._empty_probes[key] = self._empty_probes.get(key, 0) + 1
            if self._empty_probes[key] >= _MAX_EMPTY_PROBES:
                self._decided[key] = inferred
            return False
        # Where samples are independent, nothing less than all of a gradient proves a layout; but
        # an auxiliary loss may mix a little.
        is_likely = evidence.proves(self.n) and (self._do_samples_mix or meeting.takes_data)
        proven = evidence.layout if is_likely or evidence.share > PROVEN else None
        routed = self._routed(meeting, evidence)
        self._decided[key] = routed or proven or self._trusted(meeting, inferred)
        return self._decided[key] is None and meeting.is_first

    def _trusted(self, meeting: Meeting, inferred: Layout | None) -> Layout | None:
        """Return the inferred layout where samples mix, so that little can be proved."""
        return inferred if meeting.takes_data and self._do_samples_mix else None

    def _routed(self, meeting: Meeting, evidence: Evidence) -> RoutedRows | None:
        """Return the origin of rows in irregular order, if the evidence confirms it."""
        for rows in self._possible_routes(meeting.node):
            owners = rows.owners(meeting.node, self.n, self._with_samples)
            if owners is not None and evidence.share_of(owners) > PROVEN:
                return rows
        return None

    def _possible_routes(self, node: Node) -> Iterator[RoutedRows]:
        found = picked_rows(node, self._with_samples) if node in self._with_samples else None
        if found is not None:
            yield from map(RoutedRows, possible_layouts((found[1],), self.n, (0,)))

    def lose(self, edge: Edge, reason: str) -> None:
        """Note why the parameters of a parameter-only tensor are not recorded."""
        for parameter in leaves(edge):
            if parameter in self.recorded:
                self.lost.setdefault(parameter, reason)


def _a_parameter(edge: Edge) -> Any:
    """Return one of the parameters that a parameter-only tensor is made of."""
    node = edge[0]
    while node.next_functions:
        node = next(child for child, _ in node.next_functions if child is not None)
    return node.variable
