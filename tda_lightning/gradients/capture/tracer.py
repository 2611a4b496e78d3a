"""Tracer: the rows in no regular order of one batch after another."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Set
from itertools import islice
from math import prod

from torch import Tensor

from tda_lightning.gradients.capture.parameter_paths import leaves
from tda_lightning.gradients.capture.probe import PROVEN
from tda_lightning.gradients.capture.probe_starts import Cuts, starts_of
from tda_lightning.gradients.capture.row_owners import Trace, trace
from tda_lightning.gradients.graph.sample_layout import IrregularRows
from tda_lightning.gradients.graph.walk import Edge, Node, Walk, output_shape

# Places at which a trace may start, from the loss on.
_MAX_STARTS = 4


class Tracer:
    """Traces rows from that place in the graph at which samples turned out to be independent.

    ``start`` is the number of the place, as :func:`.starts_of` yields them, once it is known.
    """

    def __init__(self, recorded: Mapping[Tensor, object]) -> None:
        self._recorded = recorded
        self.start: int | None = None

    def first_traces(
        self, loss: Tensor, result: Walk, nodes: Set[Node], n: int
    ) -> dict[Node, Trace]:
        """Return traces from the first place at which most nodes have rows of single samples."""
        best: dict[Node, Trace] = {}
        most = -1
        for number, start in self._starts(loss, result, n) if nodes else ():
            traces = _confirmed(trace(*start, result, nodes, n), start, result, n)
            n_proven = sum(is_proven(each) for each in traces.values())
            if n_proven > most:
                best, most = traces, n_proven
            if 2 * n_proven >= len(traces) > 0:
                self.start = number
                break
        return best

    def _starts(self, loss: Tensor, result: Walk, n: int) -> Iterator[tuple[int, tuple[Cuts, int]]]:
        """Yield the first places with their numbers; the one that was right before comes first."""
        known = self.start
        if known is not None:
            place = next(islice(starts_of(loss, result, n), known, None), None)
            if place is not None:
                yield known, place
        for number, place in enumerate(islice(starts_of(loss, result, n), _MAX_STARTS)):
            if number != known:
                yield number, place

    def rows(
        self, loss: Tensor, result: Walk, nodes: Mapping[Node, Edge], n: int
    ) -> dict[Node, IrregularRows]:
        """Return whose rows a batch has in some nodes; those that no gradient reaches are missing.

        Raises:
            ValueError: If rows belong to several samples, unlike in earlier batches.
        """
        traces: dict[Node, Trace] = {}
        shared: list[Node] = []
        for _, start in self._starts(loss, result, n):
            traces = trace(*start, result, nodes.keys(), n)
            shared = [node for node, each in traces.items() if is_disproven(each)]
            if traces and not shared:
                break
        for node in shared:
            raise ValueError(self._shared(nodes[node], float(traces[node].share), n))
        return {node: each.rows for node, each in traces.items()}

    def _shared(self, edge: Edge, share: float, n: int) -> str:
        name = next(self._recorded[leaf] for leaf in leaves(edge) if leaf in self._recorded)
        return (
            f"In a batch of {n} samples, {1 - share:.1%} of the squared gradient that arrives at "
            f"`{name}` belongs to several samples at once; expected rows of single samples, as in "
            f"earlier batches. Leave it out with `layers=['!{name}']`."
        )


# Rows of fewer numbers may look like those of a single sample by chance.
_MIN_COLUMNS = 3


def _confirmed(
    traces: dict[Node, Trace], start: tuple[Cuts, int], result: Walk, n: int
) -> dict[Node, Trace]:
    """Trace short rows again with other gradients, and leave out those of other samples then."""
    short = {
        node
        for node, each in traces.items()
        if is_proven(each) and prod(output_shape((node, 0))[1:]) < _MIN_COLUMNS
    }
    again = trace(*start, result, short, n, seed=1) if short else {}
    differing = {
        node
        for node, each in again.items()
        if not (is_proven(each) and traces[node].agrees(each.rows.of_rows))
    }
    return {node: each for node, each in traces.items() if node not in differing}


def is_proven(traced: Trace | None) -> bool:
    """Return whether nearly all of the gradient is in rows of single samples."""
    return traced is not None and float(traced.share) > PROVEN - traced.blurred


def is_disproven(traced: Trace) -> bool:
    """Return whether a gradient arrived in rows of several samples."""
    return float(traced.share) <= PROVEN - traced.blurred
