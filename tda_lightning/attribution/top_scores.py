"""Top scores: the best and the worst of each query, without the matrix in between."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from tda_lightning.arguments import require_whole
from tda_lightning.attribution.attributor import Attributor
from tda_lightning.attribution.device_view import DeviceView
from tda_lightning.results.scores import Ranking, TopScores
from tda_lightning.stores import Store


def top_scores(
    run: Store,
    queries: Float[Tensor, "n_query k"],
    method: Attributor,
    k: int,
    *,
    query_batch_size: int = 256,
    progress: bool = True,
) -> TopScores:
    """Score some queries at a time and keep the extremes.

    A sample's visits are spread over the run, so a query needs all of its scores before any can
    be dropped: queries come in blocks, and each block is a pass. What needs no query, a
    factorization say, is done once.

    Args:
        run: The recorded training.
        queries: Gradient sketches of the queries' losses, shape ``(n_query, k)``.
        method: How to attribute.
        k: How many of each kind to keep.
        query_batch_size: Queries in a block. Memory: two matrices of
            ``(query_batch_size, n_train)`` numbers.
        progress: Show a progress bar.
    """
    require_whole("query_batch_size", query_batch_size, least=1)
    method.require(run)
    precomputed = method.precomputed(DeviceView(run, queries), queries)
    best, worst, found = [], [], None
    blocks = torch.split(queries, query_batch_size)
    for block in tqdm(blocks, desc="queries", unit="block", leave=False, disable=not progress):
        found = precomputed.attribute(run, block, progress=progress and len(blocks) == 1)
        best.append(found.proponents(k))
        worst.append(found.opponents(k))
    assert found is not None  # `split` yields at least one block
    return TopScores(
        proponents=_stacked(best),
        opponents=_stacked(worst),
        query_ids=torch.arange(len(queries)),
        method=repr(method),
        provenance=found.provenance,
    )


def _stacked(parts: list[Ranking]) -> Ranking:
    return Ranking(torch.cat([p.ids for p in parts]), torch.cat([p.values for p in parts]))
