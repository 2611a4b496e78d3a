"""Find the samples of rows in no regular order, in one batch after another.

A trace, and a probe, starts where the loss no longer mixes samples: :func:`starts_of` yields the
places in question.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import replace
from itertools import islice
from math import prod
from typing import Final

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from tda_lightning.gradients.capture.indexed_rows import picked_elements
from tda_lightning.gradients.capture.parameter_paths import leaves
from tda_lightning.gradients.capture.row_owners import PROVEN, Cuts, Place, Trace, trace
from tda_lightning.gradients.graph.sample_layout import (
    IrregularRows,
    KnownRows,
    SampleLayout,
    possible_layouts,
)
from tda_lightning.gradients.graph.walk import Edge, Node, Walk, output_shape

# Places at which probes start, from the loss on, until one explains the gradients.
_MAX_CUTS = 12


# Two views of the batch, one below the other.
VIEWS: Final = SampleLayout(0, None, 1)


def starts_of(loss: Tensor, result: Walk, n: int, known: KnownRows) -> Iterator[Place]:
    """Yield places at which probes can start, each with the number of a layout there.

    An axis of exactly ``n`` entries is most likely the samples'. The loss may mix samples, as
    contrastive losses do, so starts behind its first operations follow.
    """
    joined = joined_cuts(loss, result, n, known)
    if joined:
        yield joined, 0
        return
    cuts = _cuts({loss.grad_fn}, result, n, known, is_exact=True)
    for _ in range(1 if result.has_batch_statistics else _MAX_CUTS):
        yield from ((cuts, choice) for choice in _choices(cuts))
        cuts = _cuts({edge.node for edge, _ in cuts}, result, n, known, is_exact=True)
    cuts = _cuts({loss.grad_fn}, result, n, known, is_exact=False)
    yield from ((cuts, choice) for choice in _choices(cuts))


def joined_cuts(loss: Tensor, result: Walk, n: int, known: KnownRows) -> Cuts:
    """Return where the loss has joined rows, if nothing has as many rows as samples.

    Their layout is known where the samples were followed to so many rows. Twice as many rows as
    samples are two views, one below the other. Losses that contrast all rows hardly show which rows
    are of one sample, so no other layout is tried.
    """
    if n == 1 or known.stated:
        return []
    exact, others = (
        _cuts({loss.grad_fn}, result, n, known, is_exact=is_exact) for is_exact in (True, False)
    )
    shapes = [output_shape((edge.node, edge.output_nr)) for edge, _ in exact]
    if any(shape[0] not in (2 * n, *known.followed) for shape in shapes):
        return []
    stacks = [node for node in result.with_samples if node.name() == "StackBackward0"]
    if {output_shape((node, 0))[:2] for node in stacks} & {shape[:2] for shape in shapes}:
        return []  # The views are not joined, but on another axis.
    if known.followed:
        followed = KnownRows(known.followed)
        found = _cuts({loss.grad_fn}, result, n, followed, is_exact=True, is_known=True)
        if found:
            return found
    shapes = [output_shape((edge.node, edge.output_nr)) for edge, _ in others]
    are_views = all(shape[0] == 2 * n for shape in shapes)
    return [(edge, [VIEWS]) for edge, _ in others] if are_views else []


def _choices(cuts: Cuts) -> range:
    return range(min(2, max((len(layouts) for _, layouts in cuts), default=0)))


def _cuts(
    roots: set[Node],
    result: Walk,
    n: int,
    known: KnownRows,
    *,
    is_exact: bool,
    is_known: bool = False,
) -> Cuts:
    """Return the first edges behind some nodes that have samples, with the layouts they allow.

    With ``is_exact``, the axis of the samples must have exactly ``n`` entries, or stated rows; with
    ``is_known``, only the latter count.
    """
    waiting, seen = list(roots), set(roots)
    cuts: Cuts = []
    # What arrives at its own start proves nothing.
    uncertain = {m.node for m in result.meetings if m.is_first and not m.takes_data}
    while waiting:
        node = waiting.pop()
        for child, number in node.next_functions:
            if child not in result.with_samples or child in uncertain:
                continue
            shape = output_shape((child, number))
            layouts = _known_layouts(child, shape, result, n, known) or [
                layout
                for layout in possible_layouts(shape, n, (0, 1))
                if not (is_known or (is_exact and shape[layout.axis] != n))
            ]
            edge = GradientEdge(child, number)
            if layouts:
                if all(edge != other for other, _ in cuts):
                    cuts.append((edge, layouts))
            elif child not in seen:
                seen.add(child)
                waiting.append(child)
    return cuts


def _known_layouts(
    node: Node, shape: Sequence[int], result: Walk, n: int, known: KnownRows
) -> list[SampleLayout | IrregularRows]:
    """Return the layout of a node's output, if its rows are stated, or picked from such rows."""
    axis = known.axis(shape)
    if shape and (rows := known.stated.get(shape[axis])) is not None:
        return [replace(rows, axis=axis)]
    picked = picked_elements(node, known, result.with_samples) if shape and known.stated else None
    # One row of each sample is a regular layout.
    is_irregular = picked is not None and not torch.equal(picked.of_rows.cpu(), torch.arange(n))
    return [picked] if picked is not None and is_irregular else []


# Axes of a node's output that may be the samples': `(n, ...)`, `(s, n, d)` and the like.
_MAX_AXES = 3


def joined_rows(with_samples: Iterable[Node], n: int, known: KnownRows) -> int:
    """Return the number of rows of each sample, if no operation shows the samples on an axis.

    Then nothing but the order of the rows shows whose they are.

    Args:
        with_samples: The nodes of a graph whose outputs depend on samples.
        n: Number of samples.
        known: Whose rows the batch is known to have.

    Returns:
        The largest number of rows per sample; 0 if some output has an axis of ``n`` entries, or
        rows that are known.
    """
    shapes = [shape for node in with_samples if (shape := output_shape((node, 0)))]
    places = {n, *known.stated, *known.followed}
    if n <= 1 or any(places & {*shape[:_MAX_AXES]} for shape in shapes):
        return 0
    return max((shape[0] // n for shape in shapes if shape[0] % n == 0), default=0)


# Places at which a trace may start, from the loss on.
_MAX_STARTS = 4
# Rows of fewer numbers may look like those of a single sample by chance.
_MIN_COLUMNS = 3


class Tracer:
    """Traces rows from that place in the graph at which samples turned out to be independent.

    Attributes:
        start: The number of the place, as :func:`.starts_of` yields them, once it is known.
        known: Whose rows the batch is known to have.
    """

    def __init__(self, recorded: Mapping[Tensor, object]) -> None:
        self._recorded = recorded
        self.start: int | None = None
        self.known = KnownRows()

    def first_traces(
        self, loss: Tensor, result: Walk, nodes: Set[Node], n: int
    ) -> dict[Node, Trace]:
        """Return traces from the first place at which most nodes have rows of single samples.

        Heads or views that are stacked, ``(views, n, d)``, may be as many as the samples. With the
        wrong axis, all rows of a view seem to be of one sample: rows in regular order are likelier.
        """
        best: dict[Node, Trace] = {}
        most = (-1, -1)
        edges: Cuts = []
        for number, start in self._starts(loss, result, n) if nodes else ():
            if start[0] is not edges and 2 * most[0] >= len(best) > 0:
                break  # Only the layouts at the same edges are alternatives.
            edges = start[0]
            traces = self._confirmed(self._trace(start, result, nodes, n), start, result, n)
            proven = [node for node, each in traces.items() if is_proven(each)]
            n_regular = sum(_is_regular(node, traces[node], n) for node in proven)
            if (len(proven), n_regular) > most:
                best, most = traces, (len(proven), n_regular)
                if 2 * len(proven) >= len(traces) > 0:
                    self.start = number
        return best

    def _starts(self, loss: Tensor, result: Walk, n: int) -> Iterator[tuple[int, Place]]:
        """Yield the first places with their numbers; the one that was right before comes first."""
        known = self.start
        if known is not None:
            place = next(islice(starts_of(loss, result, n, self.known), known, None), None)
            if place is not None:
                yield known, place
        places = starts_of(loss, result, n, self.known)
        for number, place in enumerate(islice(places, _MAX_STARTS)):
            if number != known:
                yield number, place

    def traces(
        self, loss: Tensor, result: Walk, nodes: Mapping[Node, tuple[int, Edge]], n: int
    ) -> dict[Node, Trace]:
        """Trace whose rows a batch has in some nodes; those that no gradient reaches are missing.

        Each node has the position and the edge of its parameter's input, for messages.

        Raises:
            ValueError: If rows belong to several samples, unlike in earlier batches.
        """
        traces: dict[Node, Trace] = {}
        shared: list[Node] = []
        for _, start in self._starts(loss, result, n):
            traces = self._trace(start, result, nodes.keys(), n)
            shared = [node for node, each in traces.items() if is_disproven(each)]
            if traces and not shared:
                break
        for node in shared:
            raise ValueError(self._shared(nodes[node][1], float(traces[node].share), n))
        return traces

    def _trace(
        self, start: Place, result: Walk, nodes: Set[Node], n: int, seed: int = 0
    ) -> dict[Node, Trace]:
        return trace(start, result, nodes, n, self.known, seed)

    def _confirmed(
        self, traces: dict[Node, Trace], start: Place, result: Walk, n: int
    ) -> dict[Node, Trace]:
        """Trace short rows with other gradients too; leave out those of other samples then."""
        short = {
            node
            for node, each in traces.items()
            if is_proven(each) and prod(output_shape((node, 0))[1:]) < _MIN_COLUMNS
        }
        again = self._trace(start, result, short, n, seed=1) if short else {}
        differing = {
            node
            for node, each in again.items()
            if not (is_proven(each) and traces[node].agrees(each.rows.of_rows))
        }
        return {node: each for node, each in traces.items() if node not in differing}

    def _shared(self, edge: Edge, share: float, n: int) -> str:
        name = next(self._recorded[leaf] for leaf in leaves(edge) if leaf in self._recorded)
        return (
            f"In a batch of {n} samples, {1 - share:.1%} of the squared gradient that arrives at "
            f"`{name}` belongs to several samples at once; expected rows of single samples, as in "
            f"earlier batches. Leave it out with `layers=['!{name}']`."
        )


def is_proven(traced: Trace | None) -> bool:
    """Return whether nearly all of the gradient is in rows of single samples."""
    return traced is not None and float(traced.share) > PROVEN - traced.blurred


def _is_regular(node: Node, traced: Trace, n: int) -> bool:
    """Return whether the rows of a node have a regular layout."""
    shape, axis = output_shape((node, 0)), traced.rows.axis
    layouts = possible_layouts(shape, n, (axis,))
    return any(traced.agrees(layout.owners(shape[axis], n)) for layout in layouts)


def is_disproven(traced: Trace) -> bool:
    """Return whether a gradient arrived in rows of several samples."""
    return float(traced.share) <= PROVEN - traced.blurred
