"""Metrics are what they say, of data that have one."""

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
KEPT = torch.rand(13, 11, generator=GENERATOR) < 0.5
SCORES = torch.randn(5, 11, generator=GENERATOR, dtype=torch.float64)
LOSSES = torch.randn(13, 5, generator=GENERATOR, dtype=torch.float64)


@pytest.mark.parametrize("decimals", [8, 0], ids=["no ties", "many ties"])
def test_the_datamodeling_score_is_spearmans_correlation_with_minus_the_loss(decimals):
    scores, losses = SCORES.round(decimals=decimals), LOSSES.round(decimals=decimals)
    predictions = scores @ KEPT.double().mT
    expected = [spearmanr(predictions[query], -losses[:, query])[0] for query in range(5)]
    found = linear_datamodeling_score(scores, KEPT, losses)
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))


def test_scores_that_made_the_losses_get_one_and_their_negation_minus_one():
    losses = -KEPT.double() @ SCORES.mT
    ones = torch.ones(5, dtype=torch.float64)
    torch.testing.assert_close(linear_datamodeling_score(SCORES, KEPT, losses), ones)
    torch.testing.assert_close(linear_datamodeling_score(-SCORES, KEPT, losses), -ones)


def test_the_datamodeling_score_depends_on_the_order_of_the_losses_only():
    found = linear_datamodeling_score(SCORES, KEPT, LOSSES)
    torch.testing.assert_close(found, linear_datamodeling_score(SCORES, KEPT, LOSSES.exp()))


def test_constant_predictions_have_no_datamodeling_score():
    found = linear_datamodeling_score(torch.zeros(5, 11), KEPT, LOSSES)
    assert found.isnan().all()


@pytest.mark.filterwarnings("ignore:An input array is constant")
@pytest.mark.parametrize("bad", [0.0, torch.nan, torch.inf])
def test_what_cannot_be_ranked_has_no_rank_agreement(bad):
    def scores(values):
        return Scores(values, torch.arange(5), torch.arange(11), "")

    strange = SCORES.clone()
    strange[1] = bad
    strange[2, 3] = bad
    for pair in ((SCORES, strange), (strange, SCORES)):
        found = rank_agreement(*map(scores, pair))
        expected = torch.tensor([spearmanr(*rows)[0] for rows in zip(*pair, strict=True)])
        torch.testing.assert_close(found, expected, equal_nan=True)
        assert found[[0, 3, 4]].tolist() == pytest.approx([1, 1, 1])


@pytest.mark.parametrize("k", [1, 4, 7, 11])
def test_recall_of_ties_is_its_mean_over_their_orders(k):
    generator = torch.Generator().manual_seed(3)
    values = torch.randint(3, (11,), generator=generator).float()
    wrong = torch.arange(11) % 3 == 0
    found = []
    for _ in range(2000):
        tied_apart = values + 0.1 * torch.rand(11, generator=generator)
        found.append(float(wrong[tied_apart.topk(k).indices].sum() / wrong.sum()))
    expected = sum(found) / len(found)
    assert mislabel_recall(values, wrong, fraction=k / 11) == pytest.approx(expected, abs=0.03)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mislabelled": torch.zeros(4, dtype=torch.bool)}, "None of `mislabelled` is true"),
        ({"values": torch.tensor([1.0, 2.0, torch.nan, 0.0])}, "of 1 samples are NaN"),
        ({"fraction": 0.1}, r"`fraction` is 0.1, of 4 samples 0; expected from 1 to all"),
        ({"fraction": 1.5}, r"`fraction` is 1.5, of 4 samples 6; expected from 1 to all"),
        ({"fraction": -0.5}, "expected a finite number above 0"),
    ],
    ids=["none", "NaN", "too few", "too many", "negative"],
)
def test_what_has_no_recall_is_refused(change, message):
    mislabelled = torch.tensor([True, False, False, True])
    given = {"values": torch.arange(4.0), "mislabelled": mislabelled}
    with pytest.raises(ValueError, match=message):
        mislabel_recall(**{**given, **change})


def test_an_area_needs_both_kinds():
    for wrong in (torch.zeros(4, dtype=torch.bool), torch.ones(4, dtype=torch.bool)):
        with pytest.raises(ValueError, match="of `mislabelled` is true; expected some"):
            mislabel_auc(torch.arange(4.0), wrong)
