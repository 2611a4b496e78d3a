"""Whose rows an index shows: elements are added up to samples, or get what their sample has."""

from __future__ import annotations

from collections.abc import Container, Set
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from tda_lightning.gradients.graph.sample_layout import IrregularRows, KnownRows, SampleLayout
from tda_lightning.gradients.graph.walk import Edge, Node, output_shape
from tda_lightning.gradients.nodes.saved_values import saved_value

# Operations that add rows up to samples, by an index.
_POOLING = frozenset(
    f"{name}Backward0" for name in ("IndexAdd", "IndexReduce", "ScatterAdd", "ScatterReduce")
)
# Operations between a loss and the place where elements are picked.
_MAX_NODES = 60


def indexed_rows(with_samples: Set[Node], n: int) -> dict[int, IrregularRows]:
    """Return whose rows an index shows, by their number.

    A model that adds elements up to samples, or repeats what a sample's elements share, has the
    sample of each element in an index.

    Args:
        with_samples: The nodes of a graph whose outputs depend on samples.
        n: Number of samples.
    """
    found: dict[int, list[Tensor]] = {}
    for node in with_samples if n > 1 else ():
        index = _sample_index(node, n, with_samples)
        if index is not None and len(index) > n:
            found.setdefault(len(index), []).append(index)
    return {
        size: IrregularRows(first % n, n)
        for size, (first, *others) in found.items()
        if all(torch.equal(first, other) for other in others)
    }


def picked_elements(
    node: Node, known: KnownRows, with_samples: Container[Node]
) -> IrregularRows | None:
    """Return whose the rows are that are picked from joined elements, ``None`` if they are not.

    A loss of the labelled elements only may have as many terms as there are samples.

    Args:
        node: A node whose output has the rows.
        known: Whose rows the batch is known to have.
        with_samples: The nodes of a graph whose outputs depend on samples.
    """
    count = output_shape((node, 0))[:1]
    waiting, seen = [node], {node}
    while waiting and len(seen) < _MAX_NODES:
        current = waiting.pop()
        index, source = _first_index(current), current.next_functions[0]
        if index is not None and source[0] in with_samples:
            rows = known.stated.get(output_shape(source)[0])
            if isinstance(rows, IrregularRows) and (len(rows.of_rows),) != count:
                return IrregularRows(rows.of_rows[index.to(rows.of_rows.device)], rows.n)
        for child, number in current.next_functions:
            is_new = child in with_samples and child not in seen
            if is_new and output_shape((child, number))[:1] == count:
                seen.add(child)
                waiting.append(child)
    return None


def stated_rows(
    node: Node, known: KnownRows, with_samples: Container[Node]
) -> SampleLayout | IrregularRows | None:
    """Return whose a node's rows are, if the batch states it, or they are picked from such rows.

    The arguments are those of :func:`picked_elements`.
    """
    shape = output_shape((node, 0))
    if not (shape and known.stated and node.next_functions):
        return None
    axis = known.axis(shape)
    if (rows := known.stated.get(shape[axis])) is not None:
        return replace(rows, axis=axis)
    return picked_elements(node, known, with_samples)


def _first_index(node: Any) -> Tensor | None:
    """Return the index, or the places of a mask, by which an operation picks rows."""
    name = type(node).__name__
    if name == "IndexSelectBackward0" and node._saved_dim == 0:
        index: Tensor = saved_value(node, "index").reshape(-1)
        return index
    if name != "IndexBackward0":
        return None
    chosen, *others = saved_value(node, "indices")
    if chosen is None or chosen.ndim != 1 or any(other is not None for other in others):
        return None
    places: Tensor = chosen.nonzero()[:, 0] if chosen.dtype == torch.bool else chosen
    return places


def _sample_index(node: Any, n: int, with_samples: Set[Node]) -> Tensor | None:
    """Return the index of rows with the numbers of samples, if an operation has one."""
    name = type(node).__name__
    if name in _POOLING:
        index, is_first = saved_value(node, "index"), node._saved_dim == 0
        samples: Edge = (node, 0)
    elif name == "IndexBackward0":
        first, *others = saved_value(node, "indices")
        index, is_first = first, first is not None and all(other is None for other in others)
        samples = node.next_functions[0]
    elif name == "IndexSelectBackward0":
        index, is_first = saved_value(node, "index"), node._saved_dim == 0
        samples = node.next_functions[0]
    else:
        return None
    if not is_first or samples[0] not in with_samples or output_shape(samples)[:1] != (n,):
        return None
    if index.ndim == 2 and index.stride(1) == 0:  # Repeated along the rows.
        index = index[:, 0]
    return index if index.ndim == 1 and index.dtype == torch.int64 else None
