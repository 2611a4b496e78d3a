"""Selecting data for a target, from a run and from data that was not trained on."""

import pytest
import torch
from lightning_models import Plain, loader, mlp, quiet_trainer, vectors
from unchecked_calls import type_checks_disabled

from tda_lightning import GradientRecorder, GradientSimilarity, InfluenceFunction, attribute, record
from tda_lightning.applications import select
from tda_lightning.applications.pruning import mean_rows
from tda_lightning.stores import MemoryStore

DATA, TARGETS = vectors(13), vectors(17)[13:]


@pytest.fixture(scope="module")
def trained():
    store, model = MemoryStore(), Plain(mlp())
    quiet_trainer(GradientRecorder(store)).fit(model, loader(DATA))
    return store, model


@pytest.mark.parametrize("method", [GradientSimilarity(), InfluenceFunction()], ids=repr)
def test_the_best_over_the_mean_or_the_maximum_of_all_targets_are_selected(trained, method):
    values = attribute(*trained, TARGETS, method=method, progress=False).values
    options = {"method": method, "progress": False}
    by_mean = select(*trained, TARGETS, n=5, reduce="mean", **options)
    by_max = select(*trained, TARGETS, n=5, reduce="max", **options)
    assert by_mean.ids.tolist() == values.mean(dim=0).topk(5).indices.tolist()
    assert by_max.ids.tolist() == values.amax(dim=0).topk(5).indices.tolist()
    assert "over 4 targets" in repr(by_max)


def test_redundancy_is_the_greedy_choice(trained):
    store, model = trained
    values = attribute(*trained, TARGETS, method=GradientSimilarity(), progress=False).values
    gains = values.amax(dim=0) / values.amax(dim=0).abs().max()
    _, rows = mean_rows(store)
    cosines = torch.nn.functional.cosine_similarity(rows[:, None], rows[None], dim=-1)

    def utility(i, chosen):
        nearest = max([0.0, *(float(cosines[i, j]) for j in chosen)])
        return float(gains[i]) - 0.7 * nearest

    greedy = []
    for _ in range(5):
        rest = [i for i in range(13) if i not in greedy]
        greedy.append(max(rest, key=lambda i: utility(i, greedy)))
    chosen = select(store, model, TARGETS, n=5, redundancy=0.7, progress=False)
    assert chosen.ids.tolist() == greedy
    assert greedy != gains.topk(5).indices.tolist()


@pytest.mark.parametrize("method", [GradientSimilarity(), InfluenceFunction()], ids=repr)
def test_a_pool_that_holds_the_targets_themselves_yields_them_first(trained, method):
    store, model = trained
    pool_data = vectors(17)
    pool = record(model, loader(pool_data, shuffle=False), like=store, progress=False)
    for i in (13, 14, 15, 16):
        x, y = pool_data[i : i + 1]
        first = select(
            store, model, (x, y), n=3, pool=pool, method=GradientSimilarity(), progress=False
        )
        assert int(first.ids[0]) == i
    assert len(select(store, model, TARGETS, n=7, pool=pool, method=method, progress=False)) == 7


def test_impossible_selections_are_refused(trained):
    with pytest.raises(ValueError, match="`n` is 14; expected a number from 1 to 13"):
        select(*trained, TARGETS, n=14, progress=False)
    with pytest.raises(ValueError, match="`redundancy` is -1"):
        select(*trained, TARGETS, n=3, redundancy=-1.0, progress=False)


def test_a_pool_that_is_not_recorded_is_refused(trained):
    with type_checks_disabled(), pytest.raises(ValueError, match=r"`pool` is .*`record\("):
        select(*trained, TARGETS, n=3, pool=loader(vectors()), progress=False)
