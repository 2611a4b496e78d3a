"""Metrics of rankings and of retrainings equal slow references."""

import pytest
import torch
from scipy.stats import spearmanr
from sklearn.metrics import average_precision_score
from unchecked_calls import type_checks_disabled

from tda_lightning import Scores
from tda_lightning.metrics import (
    brittleness,
    class_detection,
    datamodeling_interval,
    group_detection,
    kept_without_proponents,
    leave_one_out_correlation,
    linear_datamodeling_score,
    mean_reciprocal_rank,
    mislabel_precision,
    model_randomization,
    rank_agreement,
    recall_at_k,
    removal_curve,
    tail_patch,
    top_k_cardinality,
)

GENERATOR = torch.Generator().manual_seed(5)
SCORES = torch.randn(7, 11, generator=GENERATOR, dtype=torch.float64)
RELEVANT = torch.rand(7, 11, generator=GENERATOR) < 0.2
LOSSES = torch.rand(11, 7, generator=GENERATOR, dtype=torch.float64)


@pytest.mark.parametrize("decimals", [8, 0], ids=["no ties", "many ties"])
def test_group_detection_is_average_precision(decimals):
    members, scores = torch.arange(11) % 4 == 0, SCORES.round(decimals=decimals)
    expected = [average_precision_score(members, row) for row in scores]
    torch.testing.assert_close(group_detection(scores, members), torch.tensor(expected).double())


@pytest.mark.parametrize("k", [1, 3, 11])
def test_class_detection_counts_proponents_with_the_querys_label(k):
    train_labels, query_labels = torch.arange(11) % 3, torch.arange(7) % 3
    shares = []
    for query, row in enumerate(SCORES):
        best = sorted(range(11), key=lambda i, row=row: -row[i])[:k]
        shares += [sum(train_labels[i] == query_labels[query] for i in best) / k]
    expected = float(sum(shares) / 7)
    assert class_detection(SCORES, query_labels, train_labels, k) == pytest.approx(expected)


@pytest.mark.parametrize("k", [1, 5, 11])
def test_reciprocal_ranks_and_recall_follow_their_definitions(k):
    ranks = []
    for row, is_relevant in zip(SCORES, RELEVANT, strict=True):
        order = row.argsort(descending=True).tolist()
        places = [rank + 1 for rank, sample in enumerate(order) if is_relevant[sample]]
        ranks.append(min(places, default=None))
    assert None in ranks  # a query without relevant samples
    expected = sum(1 / rank for rank in ranks if rank) / 7
    assert mean_reciprocal_rank(SCORES, RELEVANT) == pytest.approx(expected)
    recall = sum(rank is not None and rank <= k for rank in ranks) / 7
    assert recall_at_k(SCORES, RELEVANT, k) == pytest.approx(recall)


def test_constant_scores_find_nothing():
    relevant = torch.zeros(3, 5, dtype=torch.bool)
    relevant[:, 0] = True
    assert mean_reciprocal_rank(torch.zeros(3, 5), relevant) == pytest.approx(1 / 5)
    assert recall_at_k(torch.zeros(3, 5), relevant, k=4) == 0


@pytest.mark.parametrize("k", [1, 4])
def test_cardinality_is_one_for_distinct_proponents_and_least_for_equal_queries(k):
    distinct = torch.eye(3).repeat_interleave(k, dim=1)
    assert top_k_cardinality(distinct, k) == 1
    assert top_k_cardinality(SCORES[:1].expand(7, -1), k) == pytest.approx(1 / 7)


def test_leave_one_out_correlation_is_spearmans():
    full = LOSSES.mean(dim=0)
    expected = [spearmanr(SCORES[q], LOSSES[:, q] - full[q])[0] for q in range(7)]
    result = leave_one_out_correlation(SCORES, LOSSES, full)
    torch.testing.assert_close(result, torch.tensor(expected, dtype=torch.float64))


def test_removed_are_exactly_the_highest_scores():
    kept = kept_without_proponents(SCORES[0], sizes=[1, 5])
    for mask, size in zip(kept, (1, 5), strict=True):
        assert (~mask).sum() == size
        assert SCORES[0][~mask].min() > SCORES[0][mask].max()


def test_a_flipped_prediction_stays_flipped():
    predictions = torch.tensor([[0, 1, 2], [1, 1, 2], [0, 0, 2]])
    shares = brittleness(predictions, torch.tensor([0, 1, 2]))
    assert shares.tolist() == pytest.approx([0, 1 / 3, 2 / 3])


def test_retrainings_without_effect_have_a_flat_curve():
    assert removal_curve(LOSSES[:1].expand(5, -1), LOSSES[0]).tolist() == [0] * 5
    assert tail_patch(-LOSSES[0], -LOSSES[:1].mT.expand(-1, 3)).tolist() == [0] * 7


def test_the_interval_holds_the_score_and_narrows_with_more_retrainings():
    def interval(n_subsets):
        chance = torch.Generator().manual_seed(1)
        kept = torch.rand(n_subsets, 11, generator=chance) < 0.5
        noise = torch.randn(n_subsets, 7, generator=chance, dtype=torch.float64)
        losses = noise - kept.double() @ SCORES.mT
        estimate = datamodeling_interval(SCORES, kept, losses, n_resamples=100)
        mean = linear_datamodeling_score(SCORES, kept, losses).mean()
        assert estimate.value == pytest.approx(float(mean))
        assert estimate.low < estimate.value < estimate.high
        return estimate.high - estimate.low

    assert interval(101) < interval(11)


def test_precision_is_the_share_among_the_highest():
    wrong = torch.arange(11) % 3 == 0
    best = SCORES[0].topk(5).indices
    expected = float(wrong[best].double().mean())
    assert mislabel_precision(SCORES[0], wrong, k=5) == pytest.approx(expected)


def test_randomization_leaves_out_constant_queries():
    other = SCORES.flip(1)
    other[2] = 0
    one, two = (Scores(v, torch.arange(7), torch.arange(11), "") for v in (SCORES, other))
    agreement = rank_agreement(one, two)
    expected = agreement[~agreement.isnan()].mean()
    assert model_randomization(one, two) == pytest.approx(float(expected))


@pytest.mark.parametrize(
    "call",
    [
        lambda: group_detection(SCORES, torch.zeros(11, dtype=torch.bool)),
        lambda: recall_at_k(SCORES, RELEVANT, k=12),
        lambda: top_k_cardinality(SCORES, k=0),
        lambda: kept_without_proponents(SCORES[0], sizes=[12]),
    ],
)
def test_arguments_that_do_not_fit_are_refused(call):
    with pytest.raises(ValueError, match="expected"):
        call()


WITH_NAN = SCORES.masked_fill(torch.eye(7, 11, dtype=torch.bool), torch.nan)


@pytest.mark.parametrize(
    "call",
    [
        lambda: group_detection(WITH_NAN, RELEVANT[0] | RELEVANT[1]),
        lambda: class_detection(WITH_NAN, torch.zeros(7).long(), torch.zeros(11).long()),
        lambda: mean_reciprocal_rank(WITH_NAN, RELEVANT),
        lambda: recall_at_k(WITH_NAN, RELEVANT, k=3),
        lambda: top_k_cardinality(WITH_NAN, k=3),
        lambda: kept_without_proponents(WITH_NAN[0], sizes=[1]),
    ],
)
def test_nan_has_no_rank(call):
    with pytest.raises(ValueError, match="NaN has no rank"):
        call()


@pytest.mark.parametrize(
    "call",
    [
        lambda: class_detection(SCORES, torch.zeros(7, 1).long(), torch.zeros(11).long()),
        lambda: class_detection(SCORES, torch.zeros(7).long(), torch.zeros(11, 1).long()),
        lambda: removal_curve(LOSSES, LOSSES[0, :1]),
        lambda: removal_curve(LOSSES[:, :1], LOSSES[0]),
    ],
)
def test_arguments_that_would_broadcast_are_refused(call):
    with type_checks_disabled(), pytest.raises(ValueError, match="expected the shapes"):
        call()
