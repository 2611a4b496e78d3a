"""Scores: rankings, files, data frames and what they look like."""

import pytest
import torch

from tda_lightning import SampleScores, Scores
from tda_lightning.metrics import mislabel_auc, mislabel_recall

SCORES = Scores(
    values=torch.tensor([[0.5, -1.0, 0.0, 2.0], [-0.25, 4.0, 1.0, -3.0]]),
    query_ids=torch.arange(2),
    train_ids=torch.tensor([3, 5, 7, 11]),
    method="TracIn()",
)
SAMPLES = SampleScores(torch.tensor([0.5, -1.0, 2.0]), torch.tensor([3, 5, 7]), "TracIn()")


def test_proponents_and_opponents_are_named_by_their_ids():
    assert SCORES.proponents(2).ids.tolist() == [[11, 3], [5, 7]]
    assert SCORES.proponents(2).values.tolist() == [[2.0, 0.5], [4.0, 1.0]]
    assert SCORES.opponents(1).ids.tolist() == [[5], [11]]
    assert SAMPLES.highest(2).tolist() == [7, 3]
    assert SAMPLES.lowest(1).tolist() == [5]


@pytest.mark.parametrize("k", [0, 5])
def test_more_than_there_are_cannot_be_ranked(k):
    with pytest.raises(ValueError, match=f"`k` is {k}; expected a number from 1 to 4"):
        SCORES.proponents(k)


@pytest.mark.parametrize("scores", [SCORES, SAMPLES], ids=lambda scores: type(scores).__name__)
def test_files_give_back_what_was_saved(tmp_path, scores):
    scores.save(tmp_path / "scores.npz")
    again = type(scores).load(tmp_path / "scores.npz")
    assert torch.equal(again.values, scores.values)
    assert torch.equal(again.train_ids, scores.train_ids)
    assert again.method == scores.method
    assert [file.name for file in tmp_path.iterdir()] == ["scores.npz"]


def test_files_of_another_kind_are_refused(tmp_path):
    SAMPLES.save(tmp_path / "scores.npz")
    with pytest.raises(ValueError, match="with the class that saved them"):
        Scores.load(tmp_path / "scores.npz")


def test_data_frames_are_labelled():
    frame = SCORES.to_pandas()
    assert frame.loc[1, 11] == -3.0
    assert (frame.index.name, frame.columns.name) == ("query", "train")
    assert SAMPLES.to_pandas()[7] == 2.0


def test_scores_show_what_one_wants_to_know_first():
    assert repr(SCORES).splitlines() == [
        "Scores of 2 queries x 4 training samples by TracIn()",
        "  query 0: proponents 11 (+2), 3 (+0.5), 7 (+0); opponents 5 (-1), 7 (+0), 3 (+0.5)",
        "  query 1: proponents 5 (+4), 7 (+1), 3 (-0.25); opponents 11 (-3), 3 (-0.25), 7 (+1)",
    ]
    assert "highest 7 (+2), 3 (+0.5), 5 (-1)" in repr(SAMPLES)
    assert repr(SCORES.proponents(1)).splitlines()[1] == "  query 0: 11 (+2)"


def test_auc_is_the_probability_of_ranking_a_pair_rightly():
    generator = torch.Generator().manual_seed(0)
    values = torch.randint(5, (31,), generator=generator).float()
    wrong = torch.rand(31, generator=generator) < 0.3
    pairs = [float(a > b) + float(a == b) / 2 for a in values[wrong] for b in values[~wrong]]
    assert mislabel_auc(values, wrong) == pytest.approx(sum(pairs) / len(pairs))


def test_recall_counts_what_one_would_look_at():
    values, wrong = torch.arange(20.0), torch.arange(20) % 9 == 1
    assert mislabel_recall(values, wrong, fraction=0.1) == pytest.approx(1 / 3)
    assert mislabel_recall(values, wrong, fraction=1.0) == 1.0
