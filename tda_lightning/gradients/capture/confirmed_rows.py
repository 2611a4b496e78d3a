"""ConfirmedRows: rows in no regular order that need no trace, since their batches state them.

A trace takes two backward passes. Where it has agreed with what the batches state, it is repeated
with growing distances only: in batches 1, 2, 4, 8 and so on.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Set
from dataclasses import replace

from tda_lightning.gradients.capture.indexed_rows import picked_elements
from tda_lightning.gradients.capture.row_owners import Trace
from tda_lightning.gradients.graph.sample_layout import IrregularRows, KnownRows
from tda_lightning.gradients.graph.walk import Node, output_shape

# Traces that must agree with the statements of their batches before any is left out.
_MIN_AGREEMENTS = 2
# One disagreement outweighs all agreements.
_NEVER = -(10**9)


class ConfirmedRows:
    """Counts for each kind of meeting how often a trace agreed with what the batch states."""

    def __init__(self) -> None:
        self._agreements: Counter[Hashable] = Counter()
        self._n_batches = 0

    def rows(
        self,
        kinds: Mapping[Node, Hashable],
        known: KnownRows,
        with_samples: Set[Node],
        n: int,
        trace: Callable[[], Mapping[Node, Trace]],
    ) -> dict[Node, IrregularRows]:
        """Return whose rows a batch has in some nodes; those that no gradient reaches may lack.

        Args:
            kinds: The nodes, with the kinds of their meetings.
            known: Whose rows the batch is known to have.
            with_samples: The nodes of the graph whose outputs depend on samples.
            n: Number of samples.
            trace: Traces the rows of the nodes.
        """
        self._n_batches += 1
        stated: dict[Node, IrregularRows] = {}
        ways: dict[Node, Hashable] = {}  # The kind, and how the batch states its rows.
        # With the rows that they are made from. What follows from rows is computed once.
        shared: dict[Hashable, tuple[IrregularRows, IrregularRows]] = {}
        for node, kind in kinds.items():
            axis = known.axis(output_shape((node, 0)))
            rows, is_picked = _stated(node, axis, known, with_samples, n)
            if rows is not None:
                device = node._input_metadata[0].device
                if (place := (id(rows), device, axis)) not in shared:
                    moved = replace(rows, of_rows=rows.of_rows.to(device), axis=axis)
                    shared[place] = rows, moved
                stated[node], ways[node] = shared[place][1], (kind, axis, is_picked)
        is_due = self._n_batches & (self._n_batches - 1) == 0
        are_confirmed = all(self._agreements[way] >= _MIN_AGREEMENTS for way in ways.values())
        if are_confirmed and len(stated) == len(kinds) and not is_due:
            return stated
        traces = trace()
        for node in stated.keys() & traces.keys():
            agrees = traces[node].agrees(stated[node].of_rows)
            self._agreements[ways[node]] += 1 if agrees else _NEVER
        return {node: each.rows for node, each in traces.items()}


def _stated(
    node: Node, axis: int, known: KnownRows, with_samples: Set[Node], n: int
) -> tuple[IrregularRows | None, bool]:
    """Return the rows of a node if they are stated, and whether they are picked from such rows."""
    shape = output_shape((node, 0))
    size = shape[axis] if shape else 0
    rows = known.stated.get(size)
    if rows is None and shape and axis == 0:
        return picked_elements(node, known, with_samples), True
    is_clear = size != n and size not in known.followed
    return (rows if is_clear and isinstance(rows, IrregularRows) else None), False
