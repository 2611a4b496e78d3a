"""Top scores: the strongest proponents and opponents of each query, without the full matrix."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from tda_lightning.attribution.attributor import Attributor
from tda_lightning.attribution.steps import DeviceView
from tda_lightning.results.progress import progress_bar
from tda_lightning.results.ranking import Ranking
from tda_lightning.results.top_scores import TopScores
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
    """Score the queries in batches and keep the ``k`` extremes of each batch.

    The visits of a sample are spread over the run, so a query needs all of its scores before any
    can be dropped. Therefore each batch of queries is one pass over the run. Work that does not
    depend on the queries, such as a factorization, is done once. Memory: two matrices of
    ``(query_batch_size, n_train)`` numbers.
    """
    precomputed = method.precomputed(DeviceView(run, queries), queries)
    proponents, opponents, scores = [], [], None
    batches = torch.split(queries, query_batch_size)
    for batch in progress_bar(batches, "queries", "batch", shown=progress):
        scores = precomputed.attribute(run, batch, progress=progress and len(batches) == 1)
        proponents.append(scores.proponents(k))
        opponents.append(scores.opponents(k))
    assert scores is not None  # `split` yields at least one batch
    return TopScores(
        proponents=_concatenated(proponents),
        opponents=_concatenated(opponents),
        query_ids=torch.arange(len(queries)),
        method=repr(method),
        provenance=scores.provenance,
    )


def _concatenated(rankings: list[Ranking]) -> Ranking:
    ids = torch.cat([ranking.ids for ranking in rankings])
    values = torch.cat([ranking.values for ranking in rankings])
    return Ranking(ids, values, torch.arange(len(ids)))
