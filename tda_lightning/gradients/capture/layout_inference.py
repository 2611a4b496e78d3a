"""LayoutInference: where the samples may lie in a node, by its shape and what is around it.

A mixture of experts sends each token to some experts: ``hidden[token_index]``. Behind that the rows
are in no regular order, and their owners follow from the index.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from jaxtyping import Int
from torch import Tensor

from tda_lightning.gradients.capture.indexed_rows import picked_elements
from tda_lightning.gradients.capture.parameter_paths import a_parameter
from tda_lightning.gradients.capture.probe import Evidence
from tda_lightning.gradients.capture.row_owners import PROVEN, Trace
from tda_lightning.gradients.graph.sample_layout import (
    IrregularRows,
    KnownRows,
    SampleLayout,
    possible_layouts,
)
from tda_lightning.gradients.graph.walk import (
    LOOKUPS,
    TAKES_DATA,
    Edge,
    Meeting,
    Node,
    output_shape,
)
from tda_lightning.gradients.nodes.rule import rule_for
from tda_lightning.gradients.nodes.saved_values import saved_value
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
        return saved_value(node, "index").reshape(-1), node._saved_dim  # It may have no axis.
    return None, 0


class TracedRows:
    """Rows in no regular order, whose samples are traced in each batch."""


TRACED: Final = TracedRows()
Layout = SampleLayout | RoutedRows | TracedRows
# The parameter, the kind of node, the position of the input, and the operation that has made it.
Kind = tuple[Any, type, int, type]
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
    _do_samples_mix: bool = False
    _is_trusting: bool = False
    _has_doubts: bool = False
    _is_of_one_sample: bool = False
    _known: KnownRows = field(default_factory=KnownRows)
    _joined: dict[int, SampleLayout | IrregularRows] = field(default_factory=dict)

    def _inferred(self, node: Node, position: int, edge: Edge) -> Layout | None:
        shape = output_shape((node, 0))
        axes = self._axes(node, position, edge)
        if self.n == 1 and axes:
            return SampleLayout(axes[0], 1, None)
        declared = self._declared(shape, axes, edge)
        if declared is not None:
            return declared
        may_be_irregular = self._known.axis(shape) in axes
        route = next(self._possible_routes(node), None) if 0 in axes else None
        regular = route or next(possible_layouts(shape, self.n, axes), None)
        return regular or (TRACED if may_be_irregular and self._takes_data(node) else None)

    def _takes_data(self, node: Node) -> bool:
        name, shape = type(node).__name__, output_shape((node, 0))
        if name in _SPREADING and shape[self._known.axis(shape)] > 1:
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

    def _is_open(self, meeting: Meeting, layout: Any) -> bool:
        """Return whether a later batch has to decide: rows are in order that an index has picked.

        It may have picked all rows, or the rows may be of another operation behind it.
        """
        if not isinstance(layout, RoutedRows):
            return layout is UNKNOWN
        owners = layout.owners(meeting.node, self.n, self._with_samples)
        if owners is None:
            return False
        regular = possible_layouts(meeting.shape, self.n, (0,))
        found = owners.cpu()
        return any(torch.equal(each.owners(len(found), self.n), found) for each in regular)

    def _agreeing(self, meeting: Meeting, traced: Trace) -> Any:
        """Return the first layout with the owners of traced rows, or that they are traced.

        It is ``UNKNOWN`` if only one sample has a gradient.
        """
        node, n_rows = meeting.node, meeting.shape[self._known.axis(meeting.shape)]
        if self._known.are_irregular and (
            n_rows != self.n or picked_elements(node, self._known, self._with_samples) is not None
        ):
            return TRACED  # Even if a batch looks regular by chance.
        candidates: list[tuple[Layout, Tensor | None]] = [
            (rows, rows.owners(node, self.n, self._with_samples))
            for rows in self._possible_routes(node)
        ]
        candidates += [
            (layout, layout.owners(meeting.shape[0], self.n))
            for layout in possible_layouts(meeting.shape, self.n, (0,))
        ]
        agreeing = (
            layout for layout, owners in candidates if owners is not None and traced.agrees(owners)
        )
        return next(agreeing, UNKNOWN if self._is_of_one_sample else TRACED)

    def _shown(
        self, meeting: Meeting, inferred: Layout | None, evidence: Evidence
    ) -> Layout | None:
        """Return the layout that the gradient of single samples shows."""
        # Where samples are independent, nothing less than all of a gradient proves a layout; but
        # an auxiliary loss may mix a little.
        is_likely = evidence.proves(self.n) and (self._do_samples_mix or meeting.takes_data)
        proven = evidence.layout if is_likely or evidence.share > PROVEN else None
        if proven is None and meeting.takes_data:
            joined = self._joined.get(meeting.shape[0])
            proven = joined if isinstance(joined, SampleLayout) else None
        shown = self._routed(meeting, evidence) or proven
        return shown or self._trusted(meeting, inferred, evidence)

    def _trusted(
        self, meeting: Meeting, inferred: Layout | None, evidence: Evidence
    ) -> Layout | None:
        """Return the inferred layout where samples mix, so that little can be proved.

        The other operand may also be a constant, and the result parameter-only. That is tried
        first: it is right if later meetings are proved.
        """
        if not (meeting.takes_data and self._do_samples_mix):
            return None
        if (
            meeting.is_first
            and isinstance(inferred, SampleLayout)
            and not evidence.sets_apart(inferred, self.n)
        ):
            return None
        self._has_doubts = True
        return inferred if self._is_trusting else None


def are_of_one_sample(traces: Iterable[Trace]) -> bool:
    """Return whether a single sample has a gradient, which is in its rows on any axis."""
    samples: set[int] = set()
    for traced in traces:
        owners = traced.rows.of_rows[traced.is_certain & (traced.squares > 0)]
        samples.update(torch.unique(owners).cpu().tolist())
    return len(samples) < 2


def kind_of(node: Node, position: int, edge: Edge) -> Kind:
    """Return the kind of a meeting: the same one in batch after batch."""
    return a_parameter(edge), type(node), position, type(edge[0])
