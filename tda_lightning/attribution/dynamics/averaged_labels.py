"""Average the sampled labels of a step over some later ones, where few steps have any.

If labels were sampled at a share of the steps, each of these stands for several, and its rows are
scaled up. The curvature of one small batch is too noisy for that: a step would remove all of a
displacement in the few directions of its batch, and nothing elsewhere. Curvature changes slowly, so
the mean over the next such steps has the same expectation, and less noise.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from tda_lightning.stores.step import FIRST_LABELLED_STEPS, Step
from tda_lightning.stores.store import Store

# Steps are averaged until they have this many rows: enough for small batches, and few enough for
# the eigendecomposition of their products.
_N_ROWS = 256


def steps_backward(run: Store) -> Iterator[Step]:
    """Yield the steps, last to first, with averaged rows of sampled labels where few have any.

    The rows of the first steps stay as they are: all of these have labels.
    """
    window: deque[Tensor] = deque()
    is_share = False
    for number, step in zip(range(len(run) - 1, -1, -1), reversed(run), strict=True):
        rows = step.curvature_rows
        if rows is None or number < FIRST_LABELLED_STEPS:
            yield step
            continue
        is_share |= len(rows) == 0
        if is_share and len(rows):
            window.append(rows)
            while sum(map(len, window)) - len(window[0]) >= _N_ROWS:
                window.popleft()
            step = replace(step, curvature_rows=torch.cat(list(window)) / len(window) ** 0.5)
        yield step
