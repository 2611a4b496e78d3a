"""Whose rows an index shows: elements are added up to samples, or get what their sample has."""

from __future__ import annotations

from collections.abc import Set
from typing import Any

import torch
from torch import Tensor

from tda_lightning.gradients.graph.sample_layout import IrregularRows
from tda_lightning.gradients.graph.walk import Edge, Node, output_shape
from tda_lightning.gradients.nodes.rule import saved_value

# Operations that add rows up to samples, by an index.
_POOLING = frozenset(
    f"{name}Backward0" for name in ("IndexAdd", "IndexReduce", "ScatterAdd", "ScatterReduce")
)


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
