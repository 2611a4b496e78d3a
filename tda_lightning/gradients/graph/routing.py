"""Routing: whose row is it, where an operation has picked some rows of a batch.

A mixture of experts sends each token to some experts: ``hidden[token_index]``. Behind that the rows
are in no regular order, and their owners follow from the index.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from tda_lightning.gradients.graph.sample_layout import SampleLayout
from tda_lightning.gradients.graph.saved_values import saved_value
from tda_lightning.gradients.graph.walk import Node, output_shape

# Operations between the picking of rows and the use of a parameter.
_MAX_NODES = 60


@dataclass(frozen=True)
class RoutedRows:
    """Rows that an index has picked from a tensor with a regular layout.

    Attributes:
        source: Layout of the tensor that the rows come from.
    """

    source: SampleLayout

    def owners(self, node: Node, n: int, with_samples: set[Node]) -> Int[Tensor, " rows"] | None:
        """Return the sample of each row of a node's output, ``None`` if no index is found."""
        found = picked_rows(node, with_samples)
        if found is None:
            return None
        index, size = found
        return index // self.source.sizes(size, n)[1] % n


def picked_rows(node: Node, with_samples: set[Node]) -> tuple[Int[Tensor, " rows"], int] | None:
    """Return the index that has picked the rows of a node's output, and the number to pick from.

    Args:
        node: The node.
        with_samples: The nodes whose outputs have rows of samples.
    """
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
