"""LayoutMemory: where the samples lie in each node in which a parameter meets data.

A layout is inferred from shapes when a kind of meeting occurs first. It is proved in that batch,
and remembered for all later ones. Rows in no regular order are traced in batch after batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from tda_lightning.gradients.capture.confirmed_rows import ConfirmedRows
from tda_lightning.gradients.capture.indexed_rows import indexed_rows
from tda_lightning.gradients.capture.layout_inference import (
    TRACED,
    UNKNOWN,
    Kind,
    Layout,
    LayoutInference,
    RoutedRows,
    are_of_one_sample,
    kind_of,
)
from tda_lightning.gradients.capture.parameter_paths import a_parameter, leaves
from tda_lightning.gradients.capture.probe import Evidence, certainty, probe
from tda_lightning.gradients.capture.row_owners import PROVEN, Trace
from tda_lightning.gradients.capture.tracer import Tracer, is_proven, joined_cuts
from tda_lightning.gradients.graph.sample_layout import IrregularRows, KnownRows, SampleLayout
from tda_lightning.gradients.graph.walk import Edge, Meeting, Node, Walk, output_shape, walk

# The kind of a meeting, and what its shape has to do with n.
Key = tuple[Any, ...]

# Batches in which no gradient arrives at a meeting before its inferred layout is trusted.
_MAX_EMPTY_PROBES = 3
# Walks of one batch until all layouts are decided; each moves a meeting nearer to the loss.
_MAX_WALKS = 32


@dataclass
class LayoutMemory(LayoutInference):
    """Infers, proves and remembers layouts.

    Attributes:
        lost: Why the rows of a parameter cannot be separated.
        irregular: Whose rows the last batch has in nodes where their order is irregular.
        by_shape: The nodes of the last graph that shapes decide about: whether they have samples.
            Each has the position of an input, its edge, and the answer.
    """

    lost: dict[nn.Parameter, str] = field(default_factory=dict)
    irregular: dict[Node, IrregularRows] = field(default_factory=dict)
    by_shape: list[tuple[Node, int, Edge, bool]] = field(default_factory=list)
    _traced: set[Kind] = field(default_factory=set)
    _decided: dict[Key, Layout | None] = field(default_factory=dict)
    _empty_probes: dict[Key, int] = field(default_factory=dict)
    _unreached: dict[Key, Any] = field(default_factory=dict)
    # The last shape, batch size and layout of a kind of meeting.
    _last: dict[Kind, tuple[tuple[int, ...], int, Layout | None]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Prepare to trace rows."""
        self._tracer, self._confirmed = Tracer(self.recorded), ConfirmedRows()

    def walk(self, loss: Tensor, n: int, known: KnownRows) -> Walk:
        """Return the meetings in a loss's graph, with layouts that are proved for new ones."""
        self.n, self.irregular = n, {}
        decided, traced = dict(self._decided), set(self._traced)
        self._is_trusting = self._has_doubts = False
        result = self._settled_walk(loss, known)
        if self._has_doubts and self._do_samples_mix:  # Without trust, nothing is proved either.
            self._decided, self._traced = decided, traced
            self._last.clear()
            self._is_trusting = True
            result = self._settled_walk(loss, known)
        if n > 1 and not result.is_reentrant:
            self._trace(loss, result)
        return result

    def _settled_walk(self, loss: Tensor, known: KnownRows) -> Walk:
        """Walk until all layouts are decided."""
        for _ in range(_MAX_WALKS):
            self._with_samples, self.by_shape = set(), []
            result = walk(loss.grad_fn, self.recorded, self._has_samples)
            self._with_samples = result.with_samples
            self._know(known, result)
            # A reentrant checkpoint does not allow the extra backward pass of a proof.
            if self.n == 1 or result.is_reentrant or not self._decide(loss, result):
                break
        return result

    def _know(self, known: KnownRows, result: Walk) -> None:
        stated = {**indexed_rows(result.with_samples, self.n), **known.stated}
        self._known = self._tracer.known = KnownRows(stated, known.followed)

    def rows_of(self, node: Node, layout: Layout | None) -> SampleLayout | IrregularRows | None:
        """Return where the samples lie in a node of the last batch, ``None`` if it is unknown."""
        if isinstance(layout, RoutedRows) and node not in self.irregular:
            owners = layout.owners(node, self.n, self._with_samples)
            if owners is not None:
                self.irregular[node] = IrregularRows(owners, self.n)
        return layout if isinstance(layout, SampleLayout) else self.irregular.get(node)

    def continue_walk(self, root: Node, visited: dict[Node, tuple[Edge, ...]]) -> Walk:
        """Return the meetings in a part of the graph that is built during the backward pass."""
        return walk(root, self.recorded, self._has_samples, visited)

    def resume(self, n: int, with_samples: set[Node]) -> None:
        """Continue with a graph of ``n`` samples that needs no walk."""
        self.n, self._with_samples, self.irregular = n, with_samples, {}

    def forget_graph(self) -> None:
        """Let go of the nodes of the last graph."""
        self._with_samples, self.by_shape, self.irregular = set(), [], {}

    @property
    def n_exceptions(self) -> int:
        """Number of decisions that change an earlier walk."""
        return len(self.lost) + len(self._traced)

    def settled(self, node: Node, inputs: Sequence[tuple[int, Edge]]) -> list[Layout | None] | None:
        """Return the layouts at inputs of a node, ``None`` if one of them may still change."""
        if self.n > 1 and any(self._key(node, *place) not in self._decided for place in inputs):
            return None
        layouts = [self.layout(node, *place) for place in inputs]
        return None if TRACED in layouts else layouts

    def has_samples(self, node: Node, position: int, edge: Edge) -> bool:
        """Return whether the shape of a node, in which parameters are alone, shows samples."""
        return self.layout(node, position, edge) is not None

    def _has_samples(self, node: Node, position: int, edge: Edge) -> bool:
        answer = self.has_samples(node, position, edge)
        self.by_shape.append((node, position, edge, answer))
        return answer

    def _decide(self, loss: Tensor, result: Walk) -> bool:
        """Prove the layouts that are not decided yet; return whether the graph looks different."""
        open_inputs = list(self._undecided(result))
        if not open_inputs:
            return False
        axes: dict[Node, list[int]] = {}
        for meeting, position, edge, _ in open_inputs:
            wanted = axes.setdefault(meeting.node, [])
            wanted += [a for a in self._axes(meeting.node, position, edge) if a not in wanted]
        axis_of = self._known.axis
        rows = {node for node, each in axes.items() if axis_of(output_shape((node, 0))) in each}
        traces = self._tracer.first_traces(loss, result, rows, self.n)
        self._is_of_one_sample = are_of_one_sample(traces.values())
        proven = {node for node, each in traces.items() if is_proven(each)}
        rest = {node: each for node, each in axes.items() if node not in proven}
        start, known = self._tracer.start, self._tracer.known
        self._joined = {
            output_shape((edge.node, edge.output_nr))[0]: rows
            for edge, (rows, *_) in joined_cuts(loss, result, self.n, known)
        }
        evidence = probe(loss, result, rest, self.n, known, start)
        are_independent = start is not None or certainty(evidence) >= PROVEN
        self._is_trusting |= result.has_batch_statistics
        self._do_samples_mix = result.has_batch_statistics or not are_independent
        is_changed = False
        for meeting, position, edge, key in open_inputs:
            found = evidence.get(meeting.node), traces.get(meeting.node)
            is_changed |= self._judge(meeting, position, edge, key, *found)
        self._trust_unreached()
        if is_changed and self._do_samples_mix and not self._is_trusting:
            # Samples seem to mix where meetings were none: judge the others again.
            firsts = {key for meeting, _, _, key in open_inputs if meeting.is_first}
            for _, _, _, key in open_inputs:
                if key not in firsts or self._decided.get(key) is not None:
                    self._decided.pop(key, None)
        return is_changed

    def _trace(self, loss: Tensor, result: Walk) -> None:
        """Find the samples of all rows in no regular order."""
        nodes = {
            meeting.node: (position, edge)
            for meeting in result.meetings
            for (position, edge), layout in zip(meeting.inputs, meeting.layouts, strict=True)
            if (self.layout(meeting.node, position, edge) if layout is UNKNOWN else layout)
            is TRACED
        }
        if nodes:
            self.irregular = self._confirmed.rows(
                {node: kind_of(node, *place) for node, place in nodes.items()},
                self._known,
                result.with_samples,
                self.n,
                lambda: self._tracer.traces(loss, result, nodes, self.n),
            )
            places = [(m.node, *place) for m in result.meetings for place in m.inputs]
            layouts = (self.layout(*place) for place in places)
            if not self.irregular and all(layout in (None, TRACED) for layout in layouts):
                result.is_sampleless = True  # No shape shows samples, and neither does the loss.

    def _undecided(self, result: Walk) -> Iterator[tuple[Meeting, int, Edge, Key]]:
        """Yield the inputs whose layouts no batch has shown; note the others' layouts."""
        for meeting in result.meetings:
            node = meeting.node
            meeting.layouts = [self._last_layout(node, *place) for place in meeting.inputs]
            for (position, edge), layout in zip(meeting.inputs, meeting.layouts, strict=True):
                if layout is UNKNOWN and not self._is_traced(node, position, edge):
                    key = self._key(node, position, edge)
                    if key not in self._decided:
                        yield meeting, position, edge, key

    def _judge(
        self,
        meeting: Meeting,
        position: int,
        edge: Edge,
        key: Key,
        evidence: Evidence | None,
        traced: Trace | None,
    ) -> bool:
        """Decide about one input of a meeting; return whether it turned out to have no samples."""
        inferred = self._inferred(meeting.node, position, edge)
        if a_parameter(edge) in self.declared and inferred is not None:
            self._decided[key] = inferred
            return False
        if traced is not None and is_proven(traced):
            layout = self._agreeing(meeting, traced)
            if layout is TRACED:
                self._set_traced(meeting.node, position, edge)
            elif not self._is_open(meeting, layout):
                self._decided[key] = layout
            return False
        is_rounding = traced is not None and bool(traced.share.isnan())
        if evidence is not None and not evidence.is_empty and not is_rounding:
            shown = self._shown(meeting, inferred, evidence)
            if self._is_open(meeting, shown):
                return False
            self._decided[key] = shown
        elif traced is not None and inferred is TRACED and not is_rounding:
            self._decided[key] = None
        else:
            is_safe = inferred is not TRACED or meeting.takes_data  # It may repeat a constant.
            self._unreached[key] = inferred if is_safe else UNKNOWN
            return False
        return self._decided[key] is None and meeting.is_first

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

    def _key(self, node: Node, position: int, edge: Edge) -> Key:
        shape, n = output_shape((node, 0)), self.n
        fits = tuple((size == n, size % n == 0) for size in shape[:3])
        return (*kind_of(node, position, edge), len(shape), fits, n == 1)

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

    def lose(self, edge: Edge, reason: str) -> None:
        """Note why the parameters of a parameter-only tensor are not recorded."""
        for parameter in leaves(edge):
            if parameter in self.recorded:
                self.lost.setdefault(parameter, reason)
