"""Metrics equal their definitions; undefined metrics raise or are NaN."""

import pytest
import torch
from scipy.stats import spearmanr

from tda_lightning import Scores
from tda_lightning.metrics import (
    linear_datamodeling_score,
    mislabel_auc,
    mislabel_recall,
    rank_agreement,
)

GENERATOR = torch.Generator().manual_seed(7)
SUBSETS = torch.rand(13, 11, generator=GENERATOR) < 0.5
SCORES = torch.randn(5, 11, generator=GENERATOR, dtype=torch.float64)
LOSSES = torch.randn(13, 5, generator=GENERATOR, dtype=torch.float64)


@pytest.mark.parametrize("decimals", [8, 0], ids=["no ties", "many ties"])
def test_the_datamodeling_score_is_spearmans_correlation_with_minus_the_loss(decimals):
    scores, losses = SCORES.round(decimals=decimals), LOSSES.round(decimals=decimals)
    predictions = scores @ SUBSETS.double().mT
    expected = [spearmanr(predictions[query], -losses[:, query])[0] for query in range(5)]
    lds = linear_datamodeling_score(scores, SUBSETS, losses)
    torch.testing.assert_close(lds, torch.tensor(expected, dtype=torch.float64))


def test_scores_that_generate_the_losses_get_one_and_their_negation_minus_one():
    losses = -SUBSETS.double() @ SCORES.mT
    ones = torch.ones(5, dtype=torch.float64)
    torch.testing.assert_close(linear_datamodeling_score(SCORES, SUBSETS, losses), ones)
    torch.testing.assert_close(linear_datamodeling_score(-SCORES, SUBSETS, losses), -ones)


def test_the_datamodeling_score_depends_only_on_the_order_of_the_losses():
    lds = linear_datamodeling_score(SCORES, SUBSETS, LOSSES)
    torch.testing.assert_close(lds, linear_datamodeling_score(SCORES, SUBSETS, LOSSES.exp()))


def test_constant_predictions_have_no_datamodeling_score():
    lds = linear_datamodeling_score(torch.zeros(5, 11), SUBSETS, LOSSES)
    assert lds.isnan().all()


@pytest.mark.filterwarnings("ignore:An input array is constant")
@pytest.mark.parametrize("bad", [0.0, torch.nan, torch.inf])
def test_rows_without_ranks_have_no_rank_agreement(bad):
    def scores(values):
        return Scores(values, torch.arange(5), torch.arange(11), "")

    unrankable = SCORES.clone()
    unrankable[1] = bad
    unrankable[2, 3] = bad
    for pair in ((SCORES, unrankable), (unrankable, SCORES)):
        agreement = rank_agreement(*map(scores, pair))
        expected = torch.tensor([spearmanr(*rows)[0] for rows in zip(*pair, strict=True)])
        torch.testing.assert_close(agreement, expected, equal_nan=True)
        assert agreement[[0, 3, 4]].tolist() == pytest.approx([1, 1, 1])


@pytest.mark.parametrize("k", [1, 4, 7, 11])
def test_recall_with_ties_is_the_mean_over_orders_of_the_ties(k):
    generator = torch.Generator().manual_seed(3)
    values = torch.randint(3, (11,), generator=generator).float()
    wrong = torch.arange(11) % 3 == 0
    recalls = []
    for _ in range(2000):
        untied = values + 0.1 * torch.rand(11, generator=generator)
        recalls.append(float(wrong[untied.topk(k).indices].sum() / wrong.sum()))
    expected = sum(recalls) / len(recalls)
    assert mislabel_recall(values, wrong, fraction=k / 11) == pytest.approx(expected, abs=0.03)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"mislabelled": torch.zeros(4, dtype=torch.bool)},
            "`mislabelled` is false for all samples",
        ),
        ({"values": torch.tensor([1.0, 2.0, torch.nan, 0.0])}, "has 1 NaN among 4 numbers"),
        ({"fraction": 0.1}, "`fraction` is 0.1, which is 0 of 4 samples; expected from 1 to all"),
        ({"fraction": 1.5}, "`fraction` is 1.5, which is 6 of 4 samples; expected from 1 to all"),
        ({"fraction": -0.5}, "expected a finite number above 0"),
    ],
    ids=["none", "NaN", "too few", "too many", "negative"],
)
def test_undefined_recall_raises(changes, message):
    mislabelled = torch.tensor([True, False, False, True])
    arguments = {"values": torch.arange(4.0), "mislabelled": mislabelled}
    with pytest.raises(ValueError, match=message):
        mislabel_recall(**{**arguments, **changes})


def test_auc_without_both_kinds_of_samples_raises():
    for wrong in (torch.zeros(4, dtype=torch.bool), torch.ones(4, dtype=torch.bool)):
        message = f"`mislabelled` is {str(bool(wrong[0])).lower()} for all samples; expected some"
        with pytest.raises(ValueError, match=message):
            mislabel_auc(torch.arange(4.0), wrong)
