"""LayoutInference: where the samples may lie in a node, by its shape and what is around it.

A mixture of experts sends each token to some experts: ``hidden[token_index]``. Behind that the rows
are in no regular order, and their owners follow from the index.

:class:`LayoutDecisions` remembers what earlier batches have shown, by kind of meeting.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from jaxtyping import Int
from torch import Tensor

from tda_lightning.gradients.capture.parameter_paths import a_parameter
from tda_lightning.gradients.capture.probe import PROVEN, Evidence
from tda_lightning.gradients.graph.sample_layout import SampleLayout, possible_layouts
from tda_lightning.gradients.graph.walk import (
    LOOKUPS,
    TAKES_DATA,
    Edge,
    Meeting,
    Node,
    output_shape,
)
from tda_lightning.gradients.nodes.rule import rule_for, saved_value
from tda_lightning.stores.recipe import SampleAxis

# Operations between the picking of rows and the use of a parameter.
_MAX_NODES = 60


@dataclass(frozen=True)
class RoutedRows:
    """Rows that an index has picked from a tensor with a regular layout, ``source``."""

    source: SampleLayout

    def owners(self, node: Node, n: int, with_samples: set[Node]) -> Int[Tensor, " rows"] | None:
        """Return the sample of each row of a node's output, ``None`` if no index is found."""
        found = picked_rows(node, with_samples)
        if found is None:
            return None
        index, size = found
        return index // self.source.sizes(size, n)[1] % n


def picked_rows(node: Node, with_samples: set[Node]) -> tuple[Int[Tensor, " rows"], int] | None:
    """Return the index that has picked the rows of a node's output, and the number to pick from."""
    count = output_shape((node, 0))[0]
    waiting, seen = deque([node]), {node}
    while waiting and len(seen) < _MAX_NODES:
        current = waiting.popleft()
        index, axis = (None, 0) if current is node else _row_index(current)
        source = current.next_functions[0]
        if index is not None and len(index) == count and source[0] in with_samples:
            size = output_shape(source)[axis]
            return torch.where(index < 0, index + size, index), size
        for child, number in current.next_functions:
            is_new = child in with_samples and child not in seen
            if is_new and count in output_shape((child, number))[:2]:
                seen.add(child)
                waiting.append(child)
    return None


def _row_index(node: Any) -> tuple[Tensor | None, int]:
    """Return the index of an operation that picks entries of an axis, and that axis."""
    name = type(node).__name__
    if name == "IndexBackward0":
        indices = list(enumerate(saved_value(node, "indices")))
        used = [(axis, index) for axis, index in indices if index is not None]
        if len(used) == 1 and used[0][1].ndim == 1 and used[0][1].dtype == torch.int64:
            return used[0][1], used[0][0]
    if name == "IndexSelectBackward0":
        return saved_value(node, "index"), node._saved_dim
    return None, 0


# The kind of a meeting, and what its shape has to do with n.
Key = tuple[Any, ...]
# The parameter, the kind of node, the position of the input, and the operation that has made it.
Kind = tuple[Any, type, int, type]


class TracedRows:
    """Rows in no regular order, whose samples are traced in each batch."""


TRACED: Final = TracedRows()
Layout = SampleLayout | RoutedRows | TracedRows
# Earlier batches do not show where the samples lie.
UNKNOWN: Any = object()


# Operations that repeat a parameter along the rows of another tensor: of data, or of a constant.
_SPREADING = frozenset(f"{name}Backward0" for name in ("Add", "Sub", "Mul", "Div"))


@dataclass
class LayoutInference:
    """Infers layouts, unless the user has declared the axis of the samples of a parameter."""

    recorded: Mapping[Tensor, object]
    declared: Mapping[Tensor, SampleAxis] = field(default_factory=dict)
    n: int = 1
    _with_samples: set[Node] = field(default_factory=set)

    def _inferred(self, node: Node, position: int, edge: Edge) -> Layout | None:
        shape = output_shape((node, 0))
        axes = self._axes(node, position, edge)
        if self.n == 1 and axes:
            return SampleLayout(axes[0], 1, None)
        declared = self._declared(shape, axes, edge)
        if declared is not None:
            return declared
        route = next(self._possible_routes(node), None) if 0 in axes else None
        regular = route or next(possible_layouts(shape, self.n, axes), None)
        return regular or (TRACED if 0 in axes and self._takes_data(node) else None)

    def _takes_data(self, node: Node) -> bool:
        name = type(node).__name__
        if name in _SPREADING and output_shape((node, 0))[0] > 1:
            return True
        is_later = any(child in self._with_samples for child, _ in node.next_functions)
        return is_later or name in TAKES_DATA or name in LOOKUPS

    def _axes(self, node: Node, position: int, edge: Edge) -> Sequence[int]:
        shape = output_shape((node, 0))
        return list(rule_for(node).axes(shape, output_shape(edge), position))

    def _declared(self, shape: tuple[int, ...], axes: Sequence[int], edge: Edge) -> Layout | None:
        """Return the layout that the user has declared, if the shape allows it."""
        declared = self.declared.get(a_parameter(edge))
        if declared is None or not axes:
            return None
        if declared in axes and shape[int(declared)] == self.n:
            layout = SampleLayout(int(declared), 1, None)
        elif declared in ("flattened", 0):
            layout = SampleLayout(axes[0], 1, None)
        else:  # The layer has joined the samples with the axes in front of them.
            layout = SampleLayout(axes[0], None, 1)
        return layout if layout.fits(shape, self.n) else None

    def _key(self, node: Node, position: int, edge: Edge) -> Key:
        shape, n = output_shape((node, 0)), self.n
        fits = tuple((size == n, size % n == 0) for size in shape[:3])
        return (*kind_of(node, position, edge), len(shape), fits, n == 1)

    def _possible_routes(self, node: Node) -> Iterator[RoutedRows]:
        found = picked_rows(node, self._with_samples) if node in self._with_samples else None
        if found is not None:
            yield from map(RoutedRows, possible_layouts((found[1],), self.n, (0,)))

    def _routed(self, meeting: Meeting, evidence: Evidence) -> RoutedRows | None:
        """Return the origin of rows in irregular order, if the evidence confirms it."""
        for rows in self._possible_routes(meeting.node):
            owners = rows.owners(meeting.node, self.n, self._with_samples)
            if owners is not None and evidence.share_of(owners) > PROVEN:
                return rows
        return None


def kind_of(node: Node, position: int, edge: Edge) -> Kind:
    """Return the kind of a meeting: the same one in batch after batch."""
    return a_parameter(edge), type(node), position, type(edge[0])


# Batches in which no gradient arrives at a meeting before its inferred layout is trusted.
_MAX_EMPTY_PROBES = 3


@dataclass
class LayoutDecisions(LayoutInference):
    """Remembers the layouts that are decided, and those of the last batch."""

    _traced: set[Kind] = field(default_factory=set)
    _decided: dict[Key, Layout | None] = field(default_factory=dict)
    _empty_probes: dict[Key, int] = field(default_factory=dict)
    _unreached: dict[Key, Any] = field(default_factory=dict)
    # The last shape, batch size and layout of a kind of meeting: most batches look the same.
    _last: dict[Kind, tuple[tuple[int, ...], int, Layout | None]] = field(default_factory=dict)

    def layout(self, node: Node, position: int, edge: Edge) -> Layout | None:
        """Return the layout at one input of a node, ``None`` if there is none."""
        layout: Layout | None = self._last_layout(node, position, edge)
        if layout is not UNKNOWN:
            return layout
        if self._is_traced(node, position, edge):
            return TRACED
        key = self._key(node, position, edge)
        if key not in self._decided:
            return self._inferred(node, position, edge)
        shape = node._input_metadata[0].shape
        layout = self._decided[key]
        if isinstance(layout, SampleLayout) and not layout.fits(shape, self.n):
            layout = self._inferred(node, position, edge)
            if layout is TRACED:
                self._set_traced(node, position, edge)
                return layout
        self._last[kind_of(node, position, edge)] = (shape, self.n, layout)
        return layout

    def _set_traced(self, node: Node, position: int, edge: Edge) -> None:
        kind = kind_of(node, position, edge)
        self._traced.add(kind)
        self._last.pop(kind, None)

    def _last_layout(self, node: Node, position: int, edge: Edge) -> Any:
        """Return the layout in the last batch, ``UNKNOWN`` if shapes have changed since."""
        last = self._last.get(kind_of(node, position, edge))
        if last is None or last[1] != self.n or last[0] != node._input_metadata[0].shape:
            return UNKNOWN
        return last[2]

    def _is_traced(self, node: Node, position: int, edge: Edge) -> bool:
        """Return whether the rows of a kind of meeting have been in no regular order."""
        return bool(self._traced) and (self.n > 1 and kind_of(node, position, edge) in self._traced)

    def _trust_unreached(self) -> None:
        """Trust the inferred layouts of kinds that no gradient has reached in several batches."""
        for key, inferred in self._unreached.items():
            count = self._empty_probes[key] = self._empty_probes.get(key, 0) + 1
            if count >= _MAX_EMPTY_PROBES and inferred is not UNKNOWN:
                self._decided.setdefault(key, inferred)
        self._unreached.clear()

    def _copied(self) -> tuple[dict[Key, Layout | None], set[Kind]]:
        return dict(self._decided), set(self._traced)

    def _restore(self, decided: dict[Key, Layout | None], traced: set[Kind]) -> None:
        """Return to the decisions at an earlier time."""
        self._decided, self._traced = decided, traced
        self._last.clear()

    def _forget(self, keys: Iterable[Key], firsts: Set[Key]) -> None:
        """Forget decisions, except that some of the first meetings in a graph are none."""
        for key in keys:
            if key not in firsts or self._decided.get(key) is not None:
                self._decided.pop(key, None)
