import pytest
import torch
from scipy.stats import spearmanr

from tda_lightning.metrics import linear_datamodeling_score

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
