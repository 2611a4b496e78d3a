"""LayoutDecisions: what earlier batches have shown about where samples lie, by kind of meeting."""

from __future__ import annotations

from collections.abc import Iterable, Set
from dataclasses import dataclass, field
from typing import Any

from tda_lightning.gradients.capture.inference import (
    TRACED,
    UNKNOWN,
    Key,
    Kind,
    Layout,
    LayoutInference,
    kind_of,
)
from tda_lightning.gradients.graph.sample_layout import SampleLayout
from tda_lightning.gradients.graph.walk import Edge, Node

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
