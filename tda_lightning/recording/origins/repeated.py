"""Whose rows they are, where a loader returns several of each sample, such as two views.

They may follow one another, or the batch may be repeated as a whole. Labels and ids are repeated
alike, and show which.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from tda_lightning.gradients.graph.sample_layout import SampleLayout

_LAYOUTS = (SampleLayout(0, 1, None), SampleLayout(0, None, 1))


def repeated_rows(tensors: Iterable[Tensor], n: int) -> dict[int, SampleLayout]:
    """Return where the samples lie in tensors of several rows per sample, by the number of rows.

    Args:
        tensors: The tensors of a batch.
        n: Number of its samples.
    """
    found: dict[int, set[SampleLayout]] = {}
    for tensor in tensors:
        size = len(tensor) if tensor.ndim else 0
        if 1 < n < size and size % n == 0:
            layouts = [layout for layout in _LAYOUTS if _is_repeated(layout, tensor, n)]
            if len(layouts) == 1:  # Equal samples fit both.
                found.setdefault(size, set()).update(layouts)
    return {size: layouts.pop() for size, layouts in found.items() if len(layouts) == 1}


def _is_repeated(layout: SampleLayout, tensor: Tensor, n: int) -> bool:
    rows = layout.samples_first(tensor, n)
    return bool((rows == rows[:, :1]).all())
