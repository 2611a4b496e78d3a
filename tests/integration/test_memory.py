"""Attribution takes the documented amount of memory, whatever the number of steps."""

import pytest
import torch
from live_bytes import LiveBytes

from tda_lightning import (
    TRAK,
    GradientSimilarity,
    HDF5Store,
    InfluenceFunction,
    Source,
    TracIn,
    Unrolled,
    embed,
)
from tda_lightning.attribution import Averaged, Linear
from tda_lightning.attribution.top_scores import top_scores
from tda_lightning.stores import Step
from tda_lightning.stores.hdf5 import segment_datasets
from tda_lightning.stores.recipe import Recipe
from tda_lightning.stores.step import ParameterGroup

N_TRAIN, N_QUERY, K, BATCH = 503, 101, 307, 37
SCORES, SQUARE, QUERIES = 4 * N_TRAIN * N_QUERY, 4 * K * K, 4 * N_QUERY * K
ROWS = 2 * 4 * BATCH * K  # of one step in float32, and those of sampled labels


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Return runs of 40 and 100 steps, in blocks of one step and segments of several."""
    monkeypatch = pytest.MonkeyPatch()
    monkeypatch.setattr(
        segment_datasets, "_BLOCK_BYTES", 1
    )  # Blocks are read as they were written.
    folder, stores = tmp_path_factory.mktemp("runs"), []
    for count in (40, 100):
        generator = torch.Generator().manual_seed(count)
        store = HDF5Store(folder / str(count), segment_bytes=2**18)
        recipe = Recipe((), (), {"name": "Identity"}, K, curvature="fisher")
        store.begin(recipe)
        for index in range(count):
            rows = torch.randn(2, BATCH, K, generator=generator) / BATCH
            store.append(
                Step(
                    index=index,
                    epoch=0,
                    optimizer="SGD",
                    groups=(ParameterGroup(lr=0.1, share=1.0),),
                    sample_ids=torch.arange(BATCH).add(index * BATCH).remainder(N_TRAIN),
                    weights=torch.full((BATCH,), 1 / BATCH),
                    sketch=rows[0],
                    terms=torch.ones(BATCH),
                    curvature=torch.rand(BATCH, generator=generator) + 0.1,
                    curvature_rows=rows[1],
                    loss="cross-entropy",
                )
            )
        store.seal()
        stores.append(store)
    yield stores
    monkeypatch.undo()


def attributed(method):
    def query(run):
        queries = torch.randn(N_QUERY, K, generator=torch.Generator().manual_seed(0))
        method.attribute(run, queries, progress=False)

    return query


def top_only(method):
    def query(run):
        top_scores(run, torch.ones(N_QUERY, K), method, 3, query_batch_size=29, progress=False)

    return query


@pytest.mark.slow
@pytest.mark.parametrize(
    ("query", "limit"),
    [
        (attributed(TracIn()), 2 * SCORES + 2 * QUERIES),
        (attributed(GradientSimilarity()), 2 * SCORES + 2 * QUERIES),
        (attributed(Unrolled()), 2 * SCORES + 3 * QUERIES),
        (attributed(Unrolled(propagator=Linear())), 2 * SCORES + 3 * QUERIES),
        (attributed(InfluenceFunction()), 2 * SCORES + 3 * QUERIES + 3 * SQUARE),
        (attributed(TRAK()), 2 * SCORES + 3 * QUERIES + 2 * SQUARE),
        (attributed(Source()), 2 * SCORES + 3 * QUERIES + 7 * SQUARE),
        (attributed(Source(segments=3)), 2 * SCORES + 3 * QUERIES + 7 * SQUARE),
        (top_only(TracIn()), 2 * SCORES * 29 / N_QUERY + 2 * QUERIES),
        (top_only(InfluenceFunction()), 2 * SCORES * 29 / N_QUERY + 2 * QUERIES + 3 * SQUARE),
        (top_only(Source()), 2 * SCORES * 29 / N_QUERY + 2 * QUERIES + 7 * SQUARE),
        (top_only(Source(segments=9)), 2 * SCORES * 29 / N_QUERY + 2 * QUERIES + 7 * SQUARE),
        (lambda run: TracIn().self_influence(run, progress=False), QUERIES),
        (lambda run: embed(run, progress=False), 3 * 4 * N_TRAIN * K + 3 * SQUARE),
        (attributed(Averaged()), 3 * SCORES + 3 * QUERIES + 3 * SQUARE),
    ],
    ids=[
        *("TracIn", "GradientSimilarity", "Unrolled", "Unrolled, linear", "InfluenceFunction"),
        *("TRAK", "Source", "Source, three segments", "top scores", "top scores, influence"),
        *("top scores, Source", "top scores, nine segments", "self-influence", "embed"),
        "Averaged",
    ],
)
def test_memory_is_as_documented_and_does_not_grow_with_steps(runs, query, limit):
    peaks = []
    for run in runs:
        with LiveBytes() as live:
            query(run)
        peaks.append(live.peak)
    assert peaks[1] < peaks[0] + 2 * ROWS  # for 60 steps more
    assert peaks[1] < limit + 4 * ROWS
